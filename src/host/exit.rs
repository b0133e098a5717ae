//! Exit codes, in one place. `docs/json.md` lists them for users.

use std::process::ExitCode;

/// How the program ends. The numbers are part of the command line's stable interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest runs at the destination and is whole.
    Completed = 0,
    /// The guest did not move: it runs at the source, or never started.
    Failed = 1,
    /// The command line asks for something that cannot be; nothing was started. clap's own number.
    Usage = 2,
    /// It is not known which host has the right to run the guest; it runs at neither until one is asked again.
    InDoubt = 3,
    /// The guest moved, but found its own memory damaged, or the two memories differed at the pause.
    Damaged = 4,
    /// The guest runs nowhere any more: the process or host that held it ended at the wrong moment.
    Lost = 5,
}

impl Exit {
    /// The number that the process ends with.
    #[must_use]
    pub fn code(self) -> u8 {
        self as u8
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}
