//! The command line: reads what is asked, has it done, and ends with the code that says how it went.

use std::process::ExitCode;

use pageferry::host::args::{self, Request};
use pageferry::host::exit::Exit;
use pageferry::host::{demo, holder, logging};

fn main() -> ExitCode {
    match args::parse() {
        Ok(Request::Demo(options)) => demo::run(&options).into(),
        Ok(Request::Holder(options)) => {
            logging::start(if options.verbose { "info" } else { "error" });
            match holder::run(&options) {
                Ok(()) => ExitCode::SUCCESS,
                Err(why) => {
                    eprintln!("pageferry: {why}");
                    Exit::Failed.into()
                }
            }
        }
        Err(error) => error.exit(),
    }
}
