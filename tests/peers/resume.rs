//! Both engines, with a wire between them that cuts the control connection.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pageferry::engine::journal::Journal;
use pageferry::engine::source::migrate;
use pageferry::migration::handover::Outcome;
use pageferry::session::caps::RateCaps;
use pageferry::wire::preamble::PREAMBLE_BYTES;

use crate::at_the_destination::Host;
use crate::at_the_source::patient;
use crate::guest::StampingGuest;
use crate::{LOOPBACK, within};

/// Where a preamble says what its connection is for, and what it says of a control link's first one.
const PURPOSE: (usize, u8) = (12, 1);

/// Passes every connection on, and can cut that of the control link.
struct Wire {
    address: SocketAddr,
    control: Arc<Mutex<Option<TcpStream>>>,
}

impl Wire {
    fn to(destination: SocketAddr) -> Self {
        let listener = TcpListener::bind(LOOPBACK).unwrap();
        let address = listener.local_addr().unwrap();
        let control: Arc<Mutex<Option<TcpStream>>> = Arc::default();
        let kept = Arc::clone(&control);
        std::thread::spawn(move || {
            while let Ok((mut near, _)) = listener.accept() {
                let mut preamble = [0; PREAMBLE_BYTES];
                let Ok(()) = near.read_exact(&mut preamble) else { continue };
                let Ok(mut far) = TcpStream::connect(destination) else { continue };
                far.write_all(&preamble).unwrap();
                if preamble[PURPOSE.0] == PURPOSE.1 {
                    *kept.lock().unwrap() = Some(near.try_clone().unwrap());
                }
                pass(near.try_clone().unwrap(), far.try_clone().unwrap());
                pass(far, near);
            }
        });
        Self { address, control }
    }

    fn cut(&self) {
        let stream = self.control.lock().unwrap().take().expect("a control connection");
        stream.shutdown(Shutdown::Both).unwrap();
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream) {
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
    });
}

#[test]
fn a_control_connection_that_is_cut_within_a_round_does_not_end_the_migration() {
    let host = Host::patient();
    let arriving = host.await_one();
    let wire = Wire::to(host.address());
    let mut options = patient(wire.address);
    // The first round takes more than a second.
    options.rate_caps = RateCaps::new(Some(2 << 20));
    let state = tempfile::tempdir().unwrap();
    let journal = Journal::open(state.path()).unwrap();
    let (guest, report) = within(Duration::from_secs(20), "a cut control connection", move || {
        let mut guest = StampingGuest::running();
        let mut ticks = 0;
        let report = migrate(&mut guest, &options, &journal, &mut |_| {
            ticks += 1;
            if ticks == 5 {
                wire.cut();
            }
        });
        (guest, report)
    });
    let Outcome::Completed { .. } = report.outcome else { panic!("{:?}", report.outcome) };
    guest.assert_stopped("at the source");
    assert!(report.warnings.iter().any(|warning| warning.contains("goes on over")), "{:?}", report.warnings);
    arriving.runs("at the destination");
}
