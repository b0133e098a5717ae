//! The command line: reads what is asked, has it done, and ends with the code that says how it went.

use std::process::ExitCode;

use pageferry::host::args::{self, Request};
use pageferry::host::{demo, holder, logging};

fn main() -> ExitCode {
    match args::parse() {
        Ok(Request::Demo(options)) => demo::run(&options).into(),
        Ok(Request::Holder(options)) => {
            logging::start(if options.verbose { "info" } else { "error" });
            holder::run(&options).into()
        }
        Err(error) => error.exit(),
    }
}
