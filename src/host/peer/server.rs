//! Takes calls from other hosts' daemons, on the addresses that migrations may use and no others.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt as _;

use crate::host::network::Offer;
use crate::session::trust::{Trust, peer_host_name};

/// Calls at a time; the next waits to be accepted.
const MOST_CALLS: usize = 64;
/// How long a caller may take to prove which host it is, and to say what it wants.
const PATIENCE: Duration = Duration::from_secs(5);
/// A call that takes longer is cut off: the longest makes a place for a guest.
const LONGEST_CALL: Duration = Duration::from_secs(60);

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The name in its certificate; nothing where hosts do without.
    pub name: Option<String>,
    /// Where it calls from.
    pub address: SocketAddr,
}

/// Asked for each caller: certificates are replaced while the daemon runs.
type TrustOfNow = Arc<dyn Fn() -> Trust + Send + Sync>;

/// Listens for other daemons. Addresses come and go ([`PeerServer::listen_at`]); dropping it ends all of them.
pub struct PeerServer {
    router: Router,
    trust: TrustOfNow,
    calls: Arc<Semaphore>,
    listening: BTreeMap<(SocketAddr, String), JoinHandle<()>>,
}

impl PeerServer {
    /// A server that listens nowhere yet. `trust` is asked for each caller.
    #[must_use]
    pub fn new(router: Router, trust: impl Fn() -> Trust + Send + Sync + 'static) -> Self {
        Self {
            router,
            trust: Arc::new(trust),
            calls: Arc::new(Semaphore::new(MOST_CALLS)),
            listening: BTreeMap::new(),
        }
    }

    /// Where it listens.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.listening.keys().map(|(address, _)| *address).collect()
    }

    /// Listens at these addresses from now on, and no others; calls under way go on. Answers what could not be done, as sentences.
    pub fn listen_at(&mut self, offers: &[Offer], port: u16) -> Vec<String> {
        let wanted = |address: &SocketAddr, interface: &String| {
            address.port() == port
                && offers.iter().any(|offer| offer.address == address.ip() && offer.interface == *interface)
        };
        self.listening.retain(|(address, interface), task| {
            let stays = wanted(address, interface) && !task.is_finished();
            if !stays {
                task.abort();
            }
            stays
        });
        let mut failed = Vec::new();
        for offer in offers {
            let key = (SocketAddr::new(offer.address, port), offer.interface.clone());
            if self.listening.contains_key(&key) {
                continue;
            }
            match listen(key.0, &key.1) {
                Ok(listener) => {
                    tracing::info!("listening for other hosts at {} on {}", key.0, key.1);
                    let task = accept(
                        listener,
                        self.router.clone(),
                        Arc::clone(&self.trust),
                        Arc::clone(&self.calls),
                    );
                    self.listening.insert(key, tokio::spawn(task));
                }
                Err(error) => failed.push(format!("{} on {} cannot be listened at, so no other host reaches this one there: {error} (`port` in the host file)", key.0, key.1)),
            }
        }
        failed
    }
}

impl Drop for PeerServer {
    fn drop(&mut self) {
        self.listening.values().for_each(JoinHandle::abort);
    }
}

fn listen(address: SocketAddr, interface: &str) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind_device(Some(interface.as_bytes()))?;
    socket.bind(address)?;
    socket.listen(128)
}

async fn accept(listener: TcpListener, router: Router, trust: TrustOfNow, calls: Arc<Semaphore>) {
    loop {
        let Ok(call) = Arc::clone(&calls).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, from)) => {
                let (router, trust) = (router.clone(), trust());
                tokio::spawn(async move {
                    take(stream, from, router, &trust).await;
                    drop(call);
                });
            }
            Err(error) => {
                tracing::warn!("a call could not be accepted: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn take(stream: TcpStream, from: SocketAddr, router: Router, trust: &Trust) {
    let _ = stream.set_nodelay(true);
    match trust {
        Trust::Insecure => serve(stream, Caller { name: None, address: from }, router).await,
        Trust::Tls(identity) => {
            let shaken = timeout(PATIENCE, TlsAcceptor::from(identity.server_config()).accept(stream)).await;
            match shaken {
                Ok(Ok(stream)) => {
                    let name = peer_host_name(stream.get_ref().1.peer_certificates().unwrap_or_default());
                    serve(stream, Caller { name, address: from }, router).await;
                }
                Ok(Err(error)) => tracing::warn!("a caller at {from} is refused: {error}"),
                Err(_) => tracing::warn!("a caller at {from} is refused: it says nothing in TLS"),
            }
        }
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, caller: Caller, router: Router) {
    let from = caller.address;
    let service = router.map_request(move |mut request: Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(caller.clone());
        request.map(axum::body::Body::new)
    });
    let mut server = hyper::server::conn::http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(PATIENCE);
    let served = server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    match timeout(LONGEST_CALL, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!("the call from {from} broke: {error}"),
        Err(_) => tracing::warn!("the call from {from} took longer than {} s", LONGEST_CALL.as_secs()),
    }
}
