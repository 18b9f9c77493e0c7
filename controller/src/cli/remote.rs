//! The commands that the daemon answers.

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::output::{self, err};
use super::{BAD_INPUT, CHANGES, Command, DONE, FAILED, FlowsCommand, OutputFormat, SnatArguments, SnatBy};
use crate::api::{ErrorKind, Failure, Request, client};
use crate::daemon::{Applied, Preview};
use crate::explain::Explanation;
use crate::flows::{ByDestination, Ended, FlowList, PortHolders, Selection, SnatUse};
use crate::observe::whois::Whois;
use crate::observe::{Drops, RuleHits, Status};

/// Asks the daemon, prints the answer; the exit code.
pub fn ask(socket: &Path, format: OutputFormat, command: Command) -> u8 {
    let request = match request(&command) {
        Ok(request) => request,
        Err(message) => {
            err(&format!("error: {message}\n"));
            return BAD_INPUT;
        }
    };
    match client::ask(socket, &request) {
        Ok(Ok(answer)) => match command {
            Command::Apply { .. } => print(format, answer, Applied::text),
            Command::Status => print(format, answer, Status::text),
            Command::Flows { end: None, .. } => print(format, answer, FlowList::text),
            Command::Flows { end: Some(_), .. } => print(format, answer, Ended::text),
            Command::Drops { .. } => print(format, answer, Drops::text),
            Command::Snat(SnatArguments { port: Some(_), .. }) => print(format, answer, PortHolders::text),
            Command::Snat(SnatArguments { by: Some(SnatBy::Destination), .. }) => {
                print(format, answer, ByDestination::text)
            }
            Command::Snat(_) => print(format, answer, SnatUse::text),
            Command::Plan { .. } => {
                let changes = answer.get("changes").and_then(Value::as_bool);
                let code = print(format, answer, Preview::text);
                if changes == Some(true) && code == DONE { CHANGES } else { code }
            }
            Command::Rules { .. } => print(format, answer, RuleHits::text),
            Command::Explain(arguments) => {
                let agrees = answer.pointer("/live/agrees").and_then(Value::as_bool);
                let text = if arguments.all_rules { Explanation::text_with_rules } else { Explanation::text };
                let code = print(format, answer, text);
                if agrees == Some(false) { FAILED } else { code }
            }
            // `request` made no question of any other.
            _ => BAD_INPUT,
        },
        Ok(Err(failure)) => refuse(format, &failure),
        Err(error) => output::fail(&error),
    }
}

fn request(command: &Command) -> Result<Request, String> {
    Ok(match command {
        Command::Apply { file } => Request::Apply { file: absolute(file)? },
        Command::Status => Request::Status,
        Command::Flows { guest, limit, end: None } => {
            Request::Flows { guest: guest.clone(), limit: Some(*limit) }
        }
        Command::Flows { end: Some(FlowsCommand::Kill { guest, from, to, protocol, dry_run }), .. } => {
            Request::KillFlows(Selection {
                guest: guest.clone(),
                from: from.clone(),
                to: to.clone(),
                protocol: protocol.clone(),
                dry_run: *dry_run,
            })
        }
        Command::Flows { end: Some(FlowsCommand::Flush { guest }), .. } => {
            Request::FlushFlows { guest: guest.clone() }
        }
        Command::Drops { all } => Request::Drops { all: *all },
        Command::Snat(SnatArguments { port: Some(port), .. }) => Request::SnatPort { port: port.clone() },
        Command::Snat(SnatArguments { guest, frontend, by: Some(SnatBy::Destination), limit, .. }) => {
            Request::SnatDestinations {
                guest: guest.clone(),
                frontend: frontend.clone(),
                limit: Some(*limit),
            }
        }
        Command::Snat(SnatArguments { guest, frontend, .. }) => {
            Request::Snat { guest: guest.clone(), frontend: frontend.clone() }
        }
        Command::Plan { file } => Request::Plan { file: absolute(file)? },
        Command::Rules { group, shadowed } => Request::Rules { group: group.clone(), shadowed: *shadowed },
        Command::Explain(arguments) => Request::Explain(crate::explain::Question {
            from: arguments.from.clone(),
            to: arguments.to.clone(),
            protocol: arguments.protocol,
            from_port: arguments.from_port,
            ipv6: arguments.ipv6,
            live: arguments.live,
        }),
        Command::Run(_)
        | Command::Down { .. }
        | Command::Check { .. }
        | Command::Schema
        | Command::Whois { .. }
        | Command::Import(_)
        | Command::Effective(_)
        | Command::Verify(_)
        | Command::Diagnose(_)
        | Command::Lint(_)
        | Command::Tags(_) => {
            return Err("this command is not asked of the daemon alone".to_owned());
        }
    })
}

/// The path as the daemon, which has another working directory, finds it.
fn absolute(file: &Path) -> Result<String, String> {
    let file = std::path::absolute(file).map_err(|error| format!("{}: {error}", file.display()))?;
    file.to_str().map(str::to_owned).ok_or_else(|| format!("{} is not UTF-8", file.display()))
}

/// Asks the daemon; where none answers, the history in its state directory.
pub fn whois(socket: &Path, format: OutputFormat, port: &str, at: Option<&str>, state_dir: &Path) -> u8 {
    let request = Request::Whois { port: port.to_owned(), at: at.map(str::to_owned) };
    match client::ask(socket, &request) {
        Ok(Ok(answer)) => print(format, answer, Whois::text),
        Ok(Err(failure)) => refuse(format, &failure),
        Err(_) => match crate::observe::whois::whois(state_dir, port, at) {
            Ok(answer) => {
                output::answer(format, &answer, Whois::text);
                DONE
            }
            Err(failure) => refuse(format, &failure),
        },
    }
}

/// Prints JSON as it came, so that a program sees fields this client does not know; a table from what it does know.
pub(super) fn print<T: DeserializeOwned + Serialize>(
    format: OutputFormat,
    answer: Value,
    text: fn(&T) -> String,
) -> u8 {
    match format {
        OutputFormat::Json => output::out(&output::json(&answer)),
        OutputFormat::Table => match serde_json::from_value::<T>(answer) {
            Ok(answer) => output::out(&text(&answer)),
            Err(error) => {
                err(&format!(
                    "error: the daemon's answer is not what this version expects ({error}); use --output json, or \
                     restart the daemon with this version\n"
                ));
                return FAILED;
            }
        },
    }
    DONE
}

pub(super) fn refuse(format: OutputFormat, failure: &Failure) -> u8 {
    if let (Some(diagnostics), OutputFormat::Json) = (&failure.diagnostics, format) {
        output::out(&output::json(diagnostics));
    }
    match &failure.rendered {
        Some(rendered) => err(&format!("{rendered}error: {}\n", failure.message)),
        None => err(&format!("error: {}\n", failure.message)),
    }
    match failure.kind {
        ErrorKind::Policy | ErrorKind::Input => BAD_INPUT,
        ErrorKind::Failed => FAILED,
    }
}
