//! Calls another host's daemon.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::host::api::ApiError;
use crate::session::path::keep_packets_small;
use crate::session::trust::{Trust, explain};

/// How long a connection may take to come about, its proof included.
const CONNECT: Duration = Duration::from_secs(3);
/// The largest answer that is read.
const MOST: usize = 4 << 20;

/// One way to call a daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dial {
    /// Where it listens.
    pub address: SocketAddr,
    /// The address here to come from.
    pub source: IpAddr,
    /// The interface here that carries it, and no other.
    pub interface: String,
}

/// Another host's daemon: who it has to be, and the ways to call it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerTarget {
    /// What whoever wants to call it called it.
    pub called: String,
    /// The name or address that its certificate must hold.
    pub name: String,
    /// The ways, the preferred first.
    pub dials: Vec<Dial>,
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// Nobody answers there.
    #[error("{address} by {interface} is not reached: {cause}; is `pageferry serve` running there?")]
    Connect {
        /// Where.
        address: SocketAddr,
        /// By which interface.
        interface: String,
        /// What the system answered.
        cause: io::Error,
    },
    /// It is not the host that it should be, or does not believe that this one is.
    #[error("{address} is not trusted: {why}")]
    Untrusted {
        /// Where.
        address: SocketAddr,
        /// In words.
        why: String,
    },
    /// The connection broke, or what came is no answer.
    #[error("{address} gives no answer that can be read: {why}")]
    Broken {
        /// Where.
        address: SocketAddr,
        /// In words.
        why: String,
    },
    /// It says no.
    #[error("{address} refuses: {why}")]
    Refused {
        /// Where.
        address: SocketAddr,
        /// In its words.
        why: String,
    },
    /// The name cannot stand in a certificate.
    #[error("{0:?} is no name of a host")]
    Name(String),
}

impl PeerTarget {
    /// Asks, by the first way that leads there.
    ///
    /// # Errors
    /// [`PeerError`] of the last way that was tried.
    pub async fn call<Q: Serialize, A: DeserializeOwned>(
        &self,
        trust: &Trust,
        path: &str,
        question: &Q,
        within: Duration,
    ) -> Result<A, PeerError> {
        let body = serde_json::to_vec(question).unwrap_or_default();
        let mut last = PeerError::Name(self.name.clone());
        for dial in &self.dials {
            match timeout(within, self.call_by(dial, trust, path, body.clone())).await {
                Ok(Ok(answer)) => {
                    return serde_json::from_slice(&answer).map_err(|error| PeerError::Broken {
                        address: dial.address,
                        why: error.to_string(),
                    });
                }
                // It has answered, or is somebody else: another way leads to the same.
                Ok(Err(error @ (PeerError::Refused { .. } | PeerError::Untrusted { .. }))) => {
                    return Err(error);
                }
                Ok(Err(error)) => last = error,
                Err(_) => {
                    let why = format!("nothing came within {} s", within.as_secs_f32());
                    last = PeerError::Broken { address: dial.address, why };
                }
            }
        }
        Err(last)
    }

    async fn call_by(
        &self,
        dial: &Dial,
        trust: &Trust,
        path: &str,
        body: Vec<u8>,
    ) -> Result<Bytes, PeerError> {
        let address = dial.address;
        let stream =
            timeout(CONNECT, connect(dial)).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let stream = stream.map_err(|cause| PeerError::Connect {
            address,
            interface: dial.interface.clone(),
            cause,
        })?;
        match trust {
            Trust::Insecure => ask(address, stream, path, body).await.map_err(without_tls),
            Trust::Tls(identity) => {
                let name = ServerName::try_from(self.name.clone())
                    .map_err(|_| PeerError::Name(self.name.clone()))?;
                let connector = TlsConnector::from(identity.client_config());
                let untrusted = |why: String| PeerError::Untrusted { address, why };
                let shaken = timeout(CONNECT, connector.connect(name, stream)).await;
                let stream = shaken
                    .map_err(|_| {
                        untrusted("it does not answer in TLS; does that host have certificates?".into())
                    })?
                    .map_err(|error| untrusted(in_words(&error)))?;
                ask(address, stream, path, body).await
            }
        }
    }
}

async fn connect(dial: &Dial) -> io::Result<TcpStream> {
    let socket = if dial.address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.bind_device(Some(dial.interface.as_bytes()))?;
    socket.bind(SocketAddr::new(dial.source, 0))?;
    // Where the network carries less than its ends promise, that can still be found out and said.
    keep_packets_small(&socket)?;
    let stream = socket.connect(dial.address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// What TLS has against the other side.
fn in_words(error: &io::Error) -> String {
    let inside = error.get_ref().and_then(|inside| inside.downcast_ref::<rustls::Error>());
    match inside {
        Some(error) => explain(error),
        None if error.kind() == io::ErrorKind::UnexpectedEof => {
            "it hung up when this host showed who it is; does that host have certificates?".into()
        }
        None => error.to_string(),
    }
}

/// A host that wants TLS hangs up on whoever does not speak it, or says so in TLS.
fn without_tls(error: PeerError) -> PeerError {
    match error {
        PeerError::Broken { address, why } => PeerError::Untrusted {
            address,
            why: format!(
                "it gives no answer to a host without certificates ({why}); if it has some, this host needs some, too ([tls] in \
                 the host file)"
            ),
        },
        other => other,
    }
}

async fn ask(
    address: SocketAddr,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    path: &str,
    body: Vec<u8>,
) -> Result<Bytes, PeerError> {
    let broken = |error: hyper::Error| {
        // With TLS 1.3 the other side's verdict on this side's certificate comes after the handshake.
        let mut below = std::error::Error::source(&error);
        while let Some(cause) = below {
            if let Some(tls) = cause.downcast_ref::<io::Error>().filter(|cause| {
                cause.get_ref().is_some_and(<dyn std::error::Error + Send + Sync>::is::<rustls::Error>)
            }) {
                return PeerError::Untrusted { address, why: in_words(tls) };
            }
            below = cause.source();
        }
        PeerError::Broken { address, why: crate::engine::chain(&error) }
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    let serving = tokio::spawn(connection);
    let request = Request::builder()
        .method(Method::POST)
        .uri(path)
        .header("host", "pageferry")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| PeerError::Broken { address, why: error.to_string() })?;
    let answer = sender.send_request(request).await.map_err(broken)?;
    let status = answer.status();
    let read = Limited::new(answer.into_body(), MOST).collect().await;
    drop(sender);
    serving.abort();
    let bytes = read.map_err(|error| PeerError::Broken { address, why: error.to_string() })?.to_bytes();
    if status == StatusCode::OK {
        return Ok(bytes);
    }
    let why = serde_json::from_slice::<ApiError>(&bytes).map_or_else(
        |_| format!("{status}: {}", String::from_utf8_lossy(&bytes[..bytes.len().min(200)])),
        |refusal| refusal.error,
    );
    Err(PeerError::Refused { address, why })
}
