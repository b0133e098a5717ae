//! What people see in a terminal of migrations, guests and checks: a line while a migration runs, an account at its end,
//! tables of several.
//!
//! Every text that another host, a file or a person gave goes through [`words::clean`] first, so that it cannot move the
//! cursor or change colours.

mod checks;
mod lists;
mod progress;
mod result;
#[cfg(test)]
pub(in crate::host) mod sample;
pub(in crate::host) mod table;
#[cfg(test)]
mod tests;
mod watch;
pub(in crate::host) mod words;

pub use checks::check_text;
pub(in crate::host) use checks::speed;
pub use lists::{guest_table, history_table, status_table};
pub use progress::progress_line;
pub use result::result_text;
pub use watch::Watch;
