//! The thread of a vCPU: runs it, serves its exits, and lets go of it when told to pause.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuExit;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

use super::devices::Devices;
use crate::dirty::kvm_ring::RingHarvester;
use crate::guest::GuestError;
use crate::sys::kvm::{Kicker, Vcpu};

/// `KVM_EXIT_DIRTY_RING_FULL`, which kvm-ioctls has no name for.
const DIRTY_RING_FULL: u32 = kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
/// A vCPU leaves the guest within microseconds; one that has not after this long never will.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);
/// How long a throttled vCPU runs between two sleeps, as QEMU's cpu-throttle.
const THROTTLE_SLICE: Duration = Duration::from_millis(10);

/// What a vCPU's thread is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Pause,
    Run,
    Quit,
}

#[derive(Debug)]
struct State {
    order: Order,
    /// The thread is outside the guest, with nothing pending, and holds no lock on the vCPU.
    parked: bool,
    throttle: u8,
    /// Why the vCPU can never run again.
    fault: Option<String>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    kicker: Kicker,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Each change of the state is one assignment, so it is whole even after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_order(&self, order: Order) {
        let mut state = self.state();
        state.order = order;
        if order != Order::Run {
            self.kicker.set(true);
        }
        self.changed.notify_all();
    }
}

/// A vCPU and its thread; parked at first. Dropping it ends both.
pub(super) struct VcpuThread {
    shared: Arc<Shared>,
    vcpu: Arc<Mutex<Vcpu>>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Starts the thread of vCPU `number`. `rings` empties its dirty ring when it is full.
    pub(super) fn spawn(
        number: usize,
        vcpu: Vcpu,
        devices: Arc<Mutex<Devices>>,
        rings: Option<RingHarvester>,
    ) -> io::Result<Self> {
        handle_kicks();
        let state = State { order: Order::Pause, parked: false, throttle: 0, fault: None };
        let shared =
            Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), kicker: vcpu.kicker()? });
        let vcpu = Arc::new(Mutex::new(vcpu));
        let runner = Runner { number, shared: Arc::clone(&shared), vcpu: Arc::clone(&vcpu), devices, rings };
        let thread =
            std::thread::Builder::new().name(format!("guest-vcpu{number}")).spawn(move || runner.run())?;
        let this = Self { shared, vcpu, thread: Some(thread) };
        this.wait_parked().map_err(io::Error::other)?;
        Ok(this)
    }

    /// Tells the vCPU to leave the guest; [`VcpuThread::wait_parked`] waits for it.
    pub(super) fn order_pause(&self) {
        self.shared.set_order(Order::Pause);
        self.kick();
    }

    /// Lets the vCPU run. One that cannot run any more stays where it is.
    pub(super) fn order_run(&self) {
        self.shared.set_order(Order::Run);
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            // The flag is set, so a signal that is lost costs time at most; `wait_parked` tries again.
            let _ = thread.kill(SIGRTMIN());
        }
    }

    /// Waits until the vCPU is out of the guest.
    pub(super) fn wait_parked(&self) -> Result<(), GuestError> {
        let deadline = Instant::now() + PAUSE_LIMIT;
        let mut state = self.shared.state();
        while !state.parked {
            if Instant::now() >= deadline {
                return Err(GuestError::new(format!(
                    "a vCPU did not leave the guest within {PAUSE_LIMIT:?}"
                )));
            }
            let waited = self.shared.changed.wait_timeout(state, Duration::from_millis(20));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if !state.parked {
                self.kick();
            }
        }
        Ok(())
    }

    /// Why this vCPU can never run again, if so.
    pub(super) fn fault(&self) -> Option<String> {
        self.shared.state().fault.clone()
    }

    /// How much of its time the vCPU sleeps, in percent.
    pub(super) fn throttle(&self, percent: u8) {
        self.shared.state().throttle = percent;
        self.shared.changed.notify_all();
    }

    /// The parked vCPU.
    pub(super) fn vcpu(&self) -> MutexGuard<'_, Vcpu> {
        self.vcpu.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.shared.set_order(Order::Quit);
        if let Some(thread) = self.thread.take() {
            while !thread.is_finished() {
                let _ = thread.kill(SIGRTMIN());
                std::thread::sleep(Duration::from_micros(200));
            }
            // A thread that panicked has said so; the guest is gone in any case.
            let _ = thread.join();
        }
    }
}

/// A signal that nothing is done about, except that it interrupts `KVM_RUN`.
fn handle_kicks() {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // It fails for numbers only that are no signal.
        let _ = register_signal_handler(SIGRTMIN(), nothing);
    });
}

/// What the thread owns.
struct Runner {
    number: usize,
    shared: Arc<Shared>,
    vcpu: Arc<Mutex<Vcpu>>,
    devices: Arc<Mutex<Devices>>,
    rings: Option<RingHarvester>,
}

impl Runner {
    fn run(self) {
        // Whoever made the guest may have blocked signals for its threads.
        let _ = unblock_signal(SIGRTMIN());
        while self.park() {
            let mut vcpu = self.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
            let fault = self.drive(&mut vcpu).err();
            drop(vcpu);
            if let Some(fault) = fault {
                tracing::error!(%fault, "a vCPU stopped for good");
                self.shared.state().fault = Some(fault);
            }
        }
    }

    /// Waits for the order to run; false when it is to quit.
    fn park(&self) -> bool {
        let mut state = self.shared.state();
        state.parked = true;
        self.shared.changed.notify_all();
        loop {
            match state.order {
                Order::Quit => return false,
                Order::Run if state.fault.is_none() => {
                    state.parked = false;
                    // Under the lock, so that the flag of a pause that comes next is not taken back.
                    self.shared.kicker.set(false);
                    return true;
                }
                Order::Run | Order::Pause => {}
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Runs the guest until the order is no longer to run. When it returns well, nothing is pending: the flag that ends
    /// `KVM_RUN` ends it only after the last exit's work is completed (api.rst 5, `KVM_EXIT_IO`).
    fn drive(&self, vcpu: &mut Vcpu) -> Result<(), String> {
        let mut slice_began = Instant::now();
        loop {
            match vcpu.run() {
                Ok(VcpuExit::IoIn(port, into)) => self.devices().read(port, into),
                Ok(VcpuExit::IoOut(port, bytes)) => self.write(port, bytes)?,
                Ok(VcpuExit::MmioRead(_, into)) => into.fill(0xff),
                Ok(VcpuExit::MmioWrite(..) | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
                Ok(VcpuExit::Unsupported(DIRTY_RING_FULL)) => self.empty_ring()?,
                Ok(exit) => return Err(format!("KVM gave up the guest: {exit:?}")),
                // EAGAIN: woken up while the vCPU waits to be started.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {
                    if self.shared.state().order != Order::Run {
                        return Ok(());
                    }
                }
                Err(error) => return Err(format!("KVM_RUN failed: {error}")),
            }
            self.sleep_for_throttle(&mut slice_began);
        }
    }

    fn devices(&self) -> MutexGuard<'_, Devices> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, port: u16, bytes: &[u8]) -> Result<(), String> {
        let mut devices = self.devices();
        devices.write(port, bytes);
        match devices.fault() {
            Some((first, second)) => {
                Err(format!("the guest took an exception; top of its stack: {first:#x} {second:#x}"))
            }
            None => Ok(()),
        }
    }

    fn empty_ring(&self) -> Result<(), String> {
        let rings = self.rings.as_ref().ok_or("a dirty ring is full, and nobody empties it")?;
        rings
            .ring_full(self.number)
            .map_err(|error| format!("a full dirty ring could not be emptied: {error}"))
    }

    /// After each slice of running, sleeps as long as the throttle wants. Built on exits, which the program makes at
    /// every tick at least; a sleep ends at once when the order or the throttle changes.
    fn sleep_for_throttle(&self, slice_began: &mut Instant) {
        let ran = slice_began.elapsed();
        if ran < THROTTLE_SLICE {
            return;
        }
        let state = self.shared.state();
        let percent = u32::from(state.throttle.min(99));
        if percent > 0 && state.order == Order::Run {
            let sleep = THROTTLE_SLICE * percent / (100 - percent);
            let unchanged =
                |state: &mut State| state.order == Order::Run && u32::from(state.throttle) == percent;
            drop(self.shared.changed.wait_timeout_while(state, sleep, unchanged));
        }
        *slice_began = Instant::now();
    }
}
