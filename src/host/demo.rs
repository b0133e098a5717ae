//! `pageferry demo`.

use crate::host::demo_options::DemoOptions;
use crate::host::exit::Exit;

/// Moves a guest between two host processes of this machine, and reports.
#[must_use]
pub fn run(options: &DemoOptions) -> Exit {
    eprintln!(
        "this build has no engine yet and cannot move {} of memory",
        crate::units::Bytes(options.memory_bytes)
    );
    Exit::Failed
}
