//! `effective`, `verify`, `diagnose`, `lint`, `tags`: asked of a policy file, or of the daemon about the one in force.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::output::{self, err};
use super::remote::{print, refuse};
use super::{BAD_INPUT, DENIED, DONE, FAILED, OutputFormat};
use crate::answers::lint::{Severity, Surroundings};
use crate::answers::{
    self, Diagnosis, DiagnosticParameters, EffectiveGroups, FlowParameters, FlowVerdict, LintReport, Profile,
    TagDetails, TagList,
};
use crate::api::{Failure, MAX_REQUEST, Request, client};
use crate::policy;

/// Which policy is asked.
#[derive(Debug, Args)]
pub struct Asked {
    /// Ask this policy file instead of the daemon. Needs neither root nor a daemon.
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
}

/// Arguments of `effective`.
#[derive(Debug, Args)]
pub struct EffectiveArguments {
    /// The network interface, by name or by an Azure id that ends in its name.
    #[arg(value_name = "NIC")]
    pub nic: String,
    #[command(flatten)]
    pub asked: Asked,
}

/// Arguments of `verify`.
#[derive(Debug, Args)]
pub struct VerifyArguments {
    /// Azure's VerificationIPFlowParameters as JSON, from a file or (-) standard input.
    #[arg(long, value_name = "FILE|-", conflicts_with_all = ["nic", "direction", "protocol", "local", "remote"])]
    pub request: Option<PathBuf>,
    /// The network interface.
    #[arg(long, value_name = "NAME", required_unless_present = "request")]
    pub nic: Option<String>,
    /// Inbound or Outbound, seen from the interface.
    #[arg(long, required_unless_present = "request")]
    pub direction: Option<String>,
    /// TCP or UDP.
    #[arg(long, default_value = "TCP")]
    pub protocol: String,
    /// The interface's end. The port of the end that sends may be *.
    #[arg(long, value_name = "IP:PORT", required_unless_present = "request")]
    pub local: Option<String>,
    /// The other end.
    #[arg(long, value_name = "IP:PORT", required_unless_present = "request")]
    pub remote: Option<String>,
    #[command(flatten)]
    pub asked: Asked,
}

/// Arguments of `diagnose`.
#[derive(Debug, Args)]
pub struct DiagnoseArguments {
    /// Azure's NetworkConfigurationDiagnosticParameters as JSON, from a file or (-) standard input.
    #[arg(long, value_name = "FILE|-",
          conflicts_with_all = ["nic", "direction", "protocol", "source", "destination", "destination_port"])]
    pub request: Option<PathBuf>,
    /// The network interface.
    #[arg(long, value_name = "NAME", required_unless_present = "request")]
    pub nic: Option<String>,
    /// Inbound or Outbound, seen from the interface.
    #[arg(long, required_unless_present = "request")]
    pub direction: Option<String>,
    /// TCP, UDP, ICMP, ESP, AH or *.
    #[arg(long, default_value = "*")]
    pub protocol: String,
    #[arg(long, value_name = "IP|PREFIX|*|TAG", default_value = "*")]
    pub source: String,
    #[arg(long, value_name = "IP|PREFIX|*|TAG", default_value = "*")]
    pub destination: String,
    #[arg(long, value_name = "PORT|RANGE|*", default_value = "*")]
    pub destination_port: String,
    #[command(flatten)]
    pub asked: Asked,
}

/// Arguments of `lint`.
#[derive(Debug, Args)]
pub struct LintArguments {
    #[command(flatten)]
    pub asked: Asked,
    /// Exit code 1 if there are findings as bad as this.
    #[arg(long, value_enum, default_value_t = Deny::Errors)]
    pub deny: Deny,
}

/// What `lint` ends with code 1 for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Deny {
    Warnings,
    Errors,
}

/// Arguments of `tags`.
#[derive(Debug, Args)]
pub struct TagsArguments {
    #[command(subcommand)]
    pub command: TagsCommand,
}

/// What is asked of tags.
#[derive(Debug, Subcommand)]
pub enum TagsCommand {
    /// All of them, with the number of prefixes and of rules that name them.
    List {
        #[command(flatten)]
        asked: Asked,
    },
    /// What a tag stands for; or the tags that an address or prefix is in. Without either, all of them.
    Show {
        #[arg(value_name = "NAME|ADDRESS")]
        name: Option<String>,
        #[command(flatten)]
        asked: Asked,
    },
}

/// Asks; the exit code if there is no answer.
fn ask(socket: &Path, format: OutputFormat, asked: &Asked, request: &Request) -> Result<Value, u8> {
    let outcome = match &asked.policy {
        None => client::ask(socket, request).map_err(|error| output::fail(&error))?,
        Some(file) => {
            let loaded = policy::load(file).map_err(|findings| {
                match format {
                    OutputFormat::Json => output::out(&output::json(&findings.to_json())),
                    OutputFormat::Table => err(&findings.render(false)),
                }
                BAD_INPUT
            })?;
            answers::answer(&loaded.network, &loaded.places, Surroundings::default(), request)
        }
    };
    outcome.map_err(|failure| refuse(format, &failure))
}

fn typed<T: DeserializeOwned>(answer: &Value) -> Result<T, u8> {
    T::deserialize(answer).map_err(|error| {
        err(&format!(
            "error: the daemon's answer is not what this version expects ({error}); restart the daemon with this \
             version\n"
        ));
        FAILED
    })
}

/// A request in Azure's JSON.
fn read_request<T: DeserializeOwned>(from: &Path) -> Result<T, Failure> {
    let name = if from == Path::new("-") { "standard input".to_owned() } else { from.display().to_string() };
    let mut text = Vec::new();
    let limit = MAX_REQUEST as u64 + 1;
    let read = if from == Path::new("-") {
        std::io::stdin().lock().take(limit).read_to_end(&mut text)
    } else {
        std::fs::File::open(from).and_then(|file| file.take(limit).read_to_end(&mut text))
    };
    read.map_err(|error| Failure::input(format!("cannot read {name}: {error}")))?;
    if text.len() > MAX_REQUEST {
        return Err(Failure::input(format!("{name} has more than {MAX_REQUEST} bytes")));
    }
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&text);
    serde_json::from_slice(text).map_err(|error| Failure::input(format!("{name}: {error}")))
}

/// `10.0.0.4:443`, `10.0.0.4:*` or `[fd00::4]:443` as address and port.
fn end(option: &str, text: &str) -> Result<(String, String), Failure> {
    let split = match text.strip_prefix('[') {
        Some(rest) => rest.split_once("]:"),
        None => text.rsplit_once(':').filter(|(address, _)| !address.contains(':')),
    };
    split.map(|(address, port)| (address.to_owned(), port.to_owned())).ok_or_else(|| {
        Failure::input(format!(
            "{option}: `{text}` is no address with port, such as 10.0.0.4:443 or [fd00::4]:443"
        ))
    })
}

/// `effective`.
pub fn effective(socket: &Path, format: OutputFormat, arguments: &EffectiveArguments) -> u8 {
    let request = Request::Effective { nic: arguments.nic.clone() };
    match ask(socket, format, &arguments.asked, &request) {
        Ok(answer) => print(format, answer, EffectiveGroups::text),
        Err(code) => code,
    }
}

/// `verify`.
pub fn verify(socket: &Path, format: OutputFormat, arguments: &VerifyArguments) -> u8 {
    let parameters = match &arguments.request {
        Some(file) => read_request(file),
        None => verify_flags(arguments),
    };
    let verdict: Result<FlowVerdict, u8> = parameters
        .map_err(|failure| refuse(format, &failure))
        .and_then(|parameters| ask(socket, format, &arguments.asked, &Request::Verify(parameters)))
        .and_then(|answer| typed(&answer));
    match verdict {
        Ok(verdict) => {
            match format {
                OutputFormat::Table => output::out(&verdict.text()),
                OutputFormat::Json => output::out(&output::json(&verdict.azure())),
            }
            if verdict.access == crate::policy::network::Access::Allow { DONE } else { DENIED }
        }
        Err(code) => code,
    }
}

fn verify_flags(arguments: &VerifyArguments) -> Result<FlowParameters, Failure> {
    let given = |value: &Option<String>| value.clone().unwrap_or_default();
    let (local_ip_address, local_port) = end("--local", &given(&arguments.local))?;
    let (remote_ip_address, remote_port) = end("--remote", &given(&arguments.remote))?;
    Ok(FlowParameters {
        target_resource_id: given(&arguments.nic),
        direction: given(&arguments.direction),
        protocol: arguments.protocol.clone(),
        local_port,
        remote_port,
        local_ip_address,
        remote_ip_address,
        target_nic_resource_id: None,
    })
}

/// `diagnose`.
pub fn diagnose(socket: &Path, format: OutputFormat, arguments: &DiagnoseArguments) -> u8 {
    let parameters = match &arguments.request {
        Some(file) => read_request(file),
        None => Ok(DiagnosticParameters {
            target_resource_id: arguments.nic.clone().unwrap_or_default(),
            profiles: vec![Profile {
                direction: arguments.direction.clone().unwrap_or_default(),
                protocol: arguments.protocol.clone(),
                source: arguments.source.clone(),
                destination: arguments.destination.clone(),
                destination_port: arguments.destination_port.clone(),
            }],
        }),
    };
    let answer = parameters
        .map_err(|failure| refuse(format, &failure))
        .and_then(|parameters| ask(socket, format, &arguments.asked, &Request::Diagnose(parameters)));
    let diagnosis: Result<Diagnosis, u8> = answer.and_then(|answer| typed(&answer));
    match diagnosis {
        Ok(diagnosis) => {
            output::answer(format, &diagnosis, Diagnosis::text);
            if diagnosis.all_allowed() { DONE } else { DENIED }
        }
        Err(code) => code,
    }
}

/// `lint`.
pub fn lint(socket: &Path, format: OutputFormat, arguments: &LintArguments) -> u8 {
    let answer = ask(socket, format, &arguments.asked, &Request::Lint);
    let report: Result<LintReport, u8> = answer.and_then(|answer| typed(&answer));
    match report {
        Ok(report) => {
            output::answer(format, &report, LintReport::text);
            let limit = match arguments.deny {
                Deny::Warnings => Severity::Warning,
                Deny::Errors => Severity::Error,
            };
            if report.at_least(limit) { FAILED } else { DONE }
        }
        Err(code) => code,
    }
}

/// `tags`.
pub fn tags(socket: &Path, format: OutputFormat, arguments: &TagsArguments) -> u8 {
    let (show, asked) = match &arguments.command {
        TagsCommand::List { asked } => (None, asked),
        TagsCommand::Show { name, asked } => (name.clone(), asked),
    };
    let listing = show.is_none();
    match ask(socket, format, asked, &Request::Tags { show }) {
        Ok(answer) if listing => print(format, answer, TagList::text),
        Ok(answer) => print(format, answer, TagDetails::text),
        Err(code) => code,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_an_address_and_a_port_of_either_family() {
        let ok = |text| end("--local", text).unwrap();
        assert_eq!(ok("10.0.0.4:443"), ("10.0.0.4".to_owned(), "443".to_owned()));
        assert_eq!(ok("10.0.0.4:*"), ("10.0.0.4".to_owned(), "*".to_owned()));
        assert_eq!(ok("[fd00::4]:443"), ("fd00::4".to_owned(), "443".to_owned()));
        for wrong in ["", "10.0.0.4", "fd00::4:443", "[fd00::4]", "fd00::4"] {
            assert!(end("--local", wrong).unwrap_err().message.contains("--local"), "{wrong}");
        }
    }
}
