//! A way through which connections pass, that can be cut, shut and opened again, and that remembers how each began and, where it
//! is asked to, all that went by.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::session::path::Path;
use crate::wire::preamble::PREAMBLE_BYTES;

pub(super) struct Gate {
    address: SocketAddr,
    shared: Arc<Shared>,
    keeper: Option<JoinHandle<()>>,
}

struct Shared {
    beyond: SocketAddr,
    shut: AtomicBool,
    passing: Mutex<Vec<TcpStream>>,
    preambles: Mutex<Vec<[u8; PREAMBLE_BYTES]>>,
    /// What went by, in both directions, where it is to be remembered.
    heard: Mutex<Option<Vec<u8>>>,
}

impl Gate {
    /// A gate before this address, open.
    pub(super) fn before(beyond: SocketAddr) -> Self {
        let shared = Shared {
            beyond,
            shut: AtomicBool::new(true),
            passing: Mutex::default(),
            preambles: Mutex::default(),
            heard: Mutex::default(),
        };
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let mut gate = Self { address, shared: Arc::new(shared), keeper: None };
        gate.open();
        gate
    }

    /// The way through it.
    pub(super) fn path(&self) -> Path {
        Path::to(self.address)
    }

    /// How each connection began, in order.
    pub(super) fn preambles(&self) -> Vec<[u8; PREAMBLE_BYTES]> {
        self.shared.preambles.lock().unwrap().clone()
    }

    /// Remembers from now on what goes by.
    pub(super) fn eavesdrop(&self) {
        self.shared.heard.lock().unwrap().get_or_insert_default();
    }

    /// What went by since.
    pub(super) fn heard(&self) -> Vec<u8> {
        self.shared.heard.lock().unwrap().clone().unwrap_or_default()
    }

    /// Cuts every connection; new ones may pass.
    pub(super) fn cut(&self) {
        for stream in self.shared.passing.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Cuts every connection and refuses new ones.
    pub(super) fn shut(&mut self) {
        self.shared.shut.store(true, Ordering::Relaxed);
        if let Some(keeper) = self.keeper.take() {
            keeper.join().unwrap();
        }
        self.cut();
    }

    /// Takes connections again.
    pub(super) fn open(&mut self) {
        let socket = TcpListener::bind(self.address).unwrap();
        self.address = socket.local_addr().unwrap();
        socket.set_nonblocking(true).unwrap();
        self.shared.shut.store(false, Ordering::Relaxed);
        let shared = Arc::clone(&self.shared);
        self.keeper = Some(std::thread::spawn(move || {
            while !shared.shut.load(Ordering::Relaxed) {
                match socket.accept() {
                    Ok((stream, _)) => shared.pass(stream),
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        }));
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.shut();
    }
}

impl Shared {
    fn pass(self: &Arc<Self>, mut near: TcpStream) {
        near.set_nonblocking(false).unwrap();
        let shared = Arc::clone(self);
        std::thread::spawn(move || {
            let mut preamble = [0; PREAMBLE_BYTES];
            let Ok(mut far) = TcpStream::connect(shared.beyond) else { return };
            for stream in [&near, &far] {
                stream.set_nodelay(true).unwrap();
                shared.passing.lock().unwrap().push(stream.try_clone().unwrap());
            }
            if near.read_exact(&mut preamble).is_err() || far.write_all(&preamble).is_err() {
                return;
            }
            shared.preambles.lock().unwrap().push(preamble);
            let (mut from, mut back) = (far.try_clone().unwrap(), near.try_clone().unwrap());
            let returning = Arc::clone(&shared);
            let back = std::thread::spawn(move || returning.carry(&mut from, &mut back));
            shared.carry(&mut near, &mut far);
            back.join().unwrap();
        });
    }

    fn carry(&self, from: &mut TcpStream, to: &mut TcpStream) {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(got @ 1..) = from.read(&mut bytes) {
            if let Some(heard) = &mut *self.heard.lock().unwrap() {
                heard.extend(&bytes[..got]);
            }
            if to.write_all(&bytes[..got]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    }
}
