//! The control socket.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use portcullis::answers;
use portcullis::answers::lint::Surroundings;
use portcullis::api::server::{Answer, bind, serve};
use portcullis::api::{self, Failure, Reply, Request};
use portcullis::observe::whois;
use portcullis::policy::{self, Loaded};
use serde_json::Value;

const POLICY: &str = include_str!("../../../examples/two-networks.yaml");

/// Sends the bytes to a control socket that answers whatever needs no kernel. The answer is one line of JSON, or nothing to a
/// client that sent nothing; and a request that is read reads back as itself.
///
/// # Panics
/// If not.
pub fn socket(bytes: &[u8]) {
    if let Ok(request) = api::parse(bytes) {
        let again = serde_json::to_vec(&request).expect("a request is JSON");
        assert_eq!(api::parse(&again).expect("it reads back"), request);
    }
    let mut client = UnixStream::connect(server()).expect("the server listens");
    // The server may have answered and gone before all of it is written.
    let _ = client.write_all(bytes);
    let _ = client.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let read = client.read_to_end(&mut answer);
    if bytes.is_empty() {
        assert!(answer.is_empty());
        return;
    }
    if bytes.len() > api::MAX_REQUEST && answer.is_empty() {
        // What it did not read resets the connection, and the answer with it.
        return;
    }
    read.expect("an answer");
    assert_eq!(answer.iter().filter(|byte| **byte == b'\n').count(), 1, "{answer:?}");
    let reply: Reply = serde_json::from_slice(&answer).expect("JSON");
    assert_eq!(reply.ok, reply.error.is_none());
}

/// Answers from a policy alone.
struct FromPolicy(Loaded);

impl Answer for FromPolicy {
    async fn answer(&self, request: Request) -> Result<Value, Failure> {
        match request {
            Request::Whois { port, at } => {
                let found = whois::whois(Path::new("/nonexistent"), &port, at.as_deref())?;
                Ok(serde_json::to_value(found).expect("JSON"))
            }
            Request::SnatPort { port } => Ok(Value::String(format!("{:?}", whois::end_and_protocol(&port)?))),
            other => {
                let around = Surroundings { host_addresses: None };
                answers::answer(&self.0.network, &self.0.places, around, &other)
            }
        }
    }
}

/// The path of a socket that is served for as long as this process lives.
fn server() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("pc-hostile-{}.sock", std::process::id()));
        let loaded = policy::parse("two-networks.yaml", POLICY).expect("the example is in order");
        let (ready, is_ready) = std::sync::mpsc::channel();
        let at = path.clone();
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = bind(&at).expect("a socket in the temporary directory");
                ready.send(()).expect("somebody waits");
                serve(listener, Arc::new(FromPolicy(loaded))).await;
            });
        });
        is_ready.recv().expect("the server starts");
        path
    })
}
