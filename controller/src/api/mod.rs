//! The control socket: one line of JSON for a question, one for the answer.
//!
//! ```text
//! {"command":"flows","guest":"vm1","limit":10}
//! {"ok":true,"answer":{"total":2,"flows":[..]}}
//! {"ok":false,"error":{"kind":"input","message":"there is no guest `vm9`; ..."}}
//! ```

pub mod client;
mod protocol;
pub mod server;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::answers::{DiagnosticParameters, FlowParameters};
use crate::explain::Question;
use crate::flows::Selection;

pub use protocol::Protocol;

/// Where the daemon listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/portcullis/control.sock";

/// Bytes of a request line; a longer one is refused.
pub const MAX_REQUEST: usize = 64 * 1024;

/// A question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "camelCase", deny_unknown_fields)]
pub enum Request {
    /// Load this file now; an absolute path.
    Apply {
        file: String,
    },
    Status,
    Flows {
        guest: Option<String>,
        limit: Option<usize>,
    },
    /// End the flows that are selected.
    KillFlows(Selection),
    /// End all flows, or all of one guest, with the ports they hold.
    FlushFlows {
        guest: Option<String>,
    },
    Drops {
        #[serde(default)]
        all: bool,
    },
    Snat {
        guest: Option<String>,
        /// A frontend's name, `lb/name`, or a public address.
        #[serde(default)]
        frontend: Option<String>,
    },
    /// Where the ports go.
    SnatDestinations {
        guest: Option<String>,
        #[serde(default)]
        frontend: Option<String>,
        limit: Option<usize>,
    },
    /// Who holds `203.0.113.5:23456`, perhaps with `/tcp` or `/udp` behind it.
    SnatPort {
        port: String,
    },
    /// Who holds it by the history on disk, now or at a time.
    Whois {
        port: String,
        at: Option<String>,
    },
    /// What `apply` of this file would change; an absolute path.
    Plan {
        file: String,
    },
    Rules {
        group: Option<String>,
        /// Also say which rules shadow a rule that can never match.
        #[serde(default)]
        shadowed: bool,
    },
    Explain(Question),
    /// The rules in force on an interface, by its name or id.
    Effective {
        nic: String,
    },
    /// IP flow verify.
    Verify(FlowParameters),
    /// NSG diagnostics.
    Diagnose(DiagnosticParameters),
    Lint,
    /// All service tags; or one by name, or those that hold an address.
    Tags {
        show: Option<String>,
    },
    /// End, leaving the datapath as it is (`down` does the rest).
    Stop,
}

/// Why a question was not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ErrorKind {
    /// The policy has errors; what was in force still is.
    Policy,
    /// The question makes no sense: a name that is not there, an address that is none.
    Input,
    /// It did not work.
    Failed,
}

/// A question that was not answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    pub kind: ErrorKind,
    pub message: String,
    /// Findings in a policy, as `check --output json` has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diagnostics: Option<Value>,
    /// The same for people, with carets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rendered: Option<String>,
}

impl Failure {
    /// The question makes no sense.
    pub fn input(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Input, message: message.into(), diagnostics: None, rendered: None }
    }

    /// It did not work.
    pub fn failed(error: &anyhow::Error) -> Self {
        let message = format!("{error:#}");
        Self { kind: ErrorKind::Failed, message, diagnostics: None, rendered: None }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::failed(&error)
    }
}

/// A line of the daemon's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    pub ok: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
}

impl Reply {
    /// The line for an outcome, newline included.
    pub fn line(outcome: Result<Value, Failure>) -> Vec<u8> {
        let reply = match outcome {
            Ok(answer) => Reply { ok: true, answer: Some(answer), error: None },
            Err(failure) => Reply { ok: false, answer: None, error: Some(failure) },
        };
        let mut line = serde_json::to_vec(&reply).unwrap_or_else(|error| {
            format!("{{\"ok\":false,\"error\":{{\"kind\":\"failed\",\"message\":\"no JSON: {error}\"}}}}")
                .into_bytes()
        });
        line.push(b'\n');
        line
    }
}

/// Reads a request line, whatever bytes it is made of.
pub fn parse(line: &[u8]) -> Result<Request, Failure> {
    if line.len() > MAX_REQUEST {
        return Err(Failure::input(format!("the request is longer than {MAX_REQUEST} bytes")));
    }
    serde_json::from_slice(line).map_err(|error| {
        Failure::input(format!(
            "not a request: {error}; one line of JSON is expected, such as {{\"command\":\"status\"}}"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_reads_back_as_it_was_written() {
        for request in [
            Request::Status,
            Request::Flows { guest: Some("vm1".into()), limit: None },
            Request::KillFlows(Selection {
                protocol: Some("tcp".into()),
                dry_run: true,
                ..Selection::default()
            }),
            Request::FlushFlows { guest: Some("vm1".into()) },
            Request::Snat { guest: None, frontend: Some("lb/fe".into()) },
            Request::SnatDestinations { guest: None, frontend: None, limit: Some(3) },
            Request::SnatPort { port: "203.0.113.5:23456/tcp".into() },
            Request::Whois { port: "203.0.113.5:23456".into(), at: Some("2h ago".into()) },
            Request::Plan { file: "/etc/portcullis/policy.yaml".into() },
            Request::Explain(Question {
                from: "vm1".into(),
                to: "1.1.1.1:443".into(),
                protocol: Protocol::Icmp6,
                live: true,
                ..Question::default()
            }),
            Request::Effective { nic: "vm1".into() },
            Request::Verify(FlowParameters {
                target_resource_id: "vm1".into(),
                direction: "Outbound".into(),
                protocol: "TCP".into(),
                local_port: "*".into(),
                remote_port: "443".into(),
                local_ip_address: "10.0.0.4".into(),
                remote_ip_address: "1.1.1.1".into(),
                target_nic_resource_id: None,
            }),
            Request::Lint,
            Request::Tags { show: Some("Internet".into()) },
            Request::Stop,
        ] {
            let line = serde_json::to_vec(&request).unwrap();
            assert_eq!(parse(&line).unwrap(), request);
        }
        assert_eq!(parse(br#"{"command":"snat"}"#).unwrap(), Request::Snat { guest: None, frontend: None });
        assert_eq!(parse(br#"{"command":"drops"}"#).unwrap(), Request::Drops { all: false });
        let all = Request::KillFlows(Selection::default());
        assert_eq!(parse(br#"{"command":"killFlows"}"#).unwrap(), all, "refused later: it selects nothing");
        // A selector that this version does not know must not widen what is ended.
        assert!(parse(br#"{"command":"killFlows","to":"1.1.1.1","toPort":443}"#).is_err());
    }

    #[test]
    fn garbage_is_refused_and_never_panics() {
        let mut seed = 0x1234_5678_9abc_def1_u64;
        for length in 0..2000usize {
            let bytes: Vec<u8> = (0..length % 97)
                .map(|_| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    seed as u8
                })
                .collect();
            assert_eq!(parse(&bytes).unwrap_err().kind, ErrorKind::Input);
        }
        for line in [
            "",
            "{}",
            "[]",
            "null",
            "{\"command\":\"nonsense\"}",
            "{\"command\":\"flows\",\"limit\":-1}",
            "\u{0}",
        ] {
            assert_eq!(parse(line.as_bytes()).unwrap_err().kind, ErrorKind::Input, "{line}");
        }
        // Nested deeper than a parser without a limit would survive.
        assert!(parse("[".repeat(60_000).as_bytes()).is_err());
        assert!(parse(&vec![b' '; MAX_REQUEST + 1]).unwrap_err().message.contains("longer"));
    }

    #[test]
    fn a_reply_is_one_line() {
        let line = Reply::line(Err(Failure::input("two\nlines")));
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        assert!(line.ends_with(b"\n"));
    }
}
