//! The command line: reads what is asked, has it done, and ends with the code that says how it went.

use std::process::ExitCode;

use pageferry::host::args::{self, Config, Pki, Rdma, Request};
use pageferry::host::exit::Exit;
use pageferry::host::{bench, commands, config, daemon, demo, holder, logging, pki, rdma, relay};

fn main() -> ExitCode {
    match args::parse() {
        Ok(request) => obey(&request).into(),
        Err(error) => error.exit(),
    }
}

fn obey(request: &Request) -> Exit {
    match request {
        Request::Demo(options) => demo::run(options),
        Request::Bench(request) => bench::run(request),
        Request::Relay(request) => relay::run(request),
        Request::Serve(options) => {
            logging::start_daemon(options.log_json, if options.verbose { "debug" } else { "info" });
            daemon::run::serve(options)
        }
        Request::Host(options, command) => commands::run(options, command),
        Request::Config(Config::Check { config, json }) => config::check(config.as_deref(), *json),
        Request::Config(Config::Show { config, json }) => config::show(config.as_deref(), *json),
        Request::Config(Config::Init { config, force }) => config::init(config.as_deref(), *force),
        Request::Config(Config::Schema) => config::schema(),
        Request::Pki(Pki::Init { dir, force, json }) => pki::init(dir, *force, *json),
        Request::Pki(Pki::Issue { host, address, dir, out, days, json }) => {
            pki::issue(dir, host, address, out.as_deref(), *days, *json)
        }
        Request::Rdma(Rdma::Devices { json }) => rdma::devices(*json),
        Request::Completions(shell) => {
            args::print_completions(*shell);
            Exit::Completed
        }
        Request::Man(directory) => match args::write_manual(directory) {
            Ok(()) => Exit::Completed,
            Err(error) => {
                eprintln!("pageferry: manual pages cannot be written to {}: {error}", directory.display());
                Exit::Failed
            }
        },
        Request::Openapi => {
            println!("{}", daemon::routes::document());
            Exit::Completed
        }
        Request::Holder(options) => {
            logging::start(if options.verbose { "info" } else { "error" });
            holder::run(options)
        }
    }
}
