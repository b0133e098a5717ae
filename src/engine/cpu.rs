//! CPU time that the migration takes, apart from the guest's own.

use std::fs;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// How the threads that run a guest are named, so that their time can be told from ours.
pub const GUEST_THREAD_PREFIX: &str = "guest-";

/// Measures from its creation on.
#[derive(Clone, Copy, Debug)]
pub struct CpuMeter {
    began: Duration,
}

impl CpuMeter {
    /// Begins to measure.
    #[must_use]
    pub fn start() -> Self {
        Self { began: own_time() }
    }

    /// CPU time of this process since then, all threads, user and system, less that of the guest's threads.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        own_time().saturating_sub(self.began)
    }
}

fn own_time() -> Duration {
    let spent = clock_gettime(ClockId::ProcessCPUTime);
    let all = Duration::new(spent.tv_sec.unsigned_abs(), u32::try_from(spent.tv_nsec).unwrap_or(0));
    all.saturating_sub(guest_time())
}

/// The first field of `/proc/self/task/*/schedstat` is nanoseconds on a CPU (Documentation/scheduler/sched-stats.rst).
fn guest_time() -> Duration {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return Duration::ZERO };
    let nanoseconds = tasks.flatten().filter_map(|task| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        name.starts_with(GUEST_THREAD_PREFIX).then_some(())?;
        let stat = fs::read_to_string(task.path().join("schedstat")).ok()?;
        stat.split_whitespace().next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanoseconds.sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn burn(iterations: u64) -> u64 {
        (0..iterations).fold(1, |value, n| std::hint::black_box(value ^ n).rotate_left(1))
    }

    #[test]
    fn a_guest_threads_time_is_not_ours() {
        let meter = CpuMeter::start();
        let (sender, receiver) = crossbeam_channel::bounded::<()>(0);
        let thread = std::thread::Builder::new()
            .name(format!("{GUEST_THREAD_PREFIX}test"))
            .spawn(move || {
                burn(100_000_000);
                // Stay: the time of a thread that has ended can no longer be told from ours.
                let _ = sender.send(());
                let _ = sender.send(());
            })
            .unwrap();
        receiver.recv().unwrap();
        let theirs = meter.elapsed();
        burn(100_000_000);
        let ours = meter.elapsed();
        receiver.recv().unwrap();
        thread.join().unwrap();
        assert!(ours > theirs * 2, "ours {ours:?} should be far more than {theirs:?}");
    }
}
