//! The door for Prometheus: `GET /metrics` over HTTP, and nothing else. Off unless asked for.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Mutex, Semaphore};
use tokio::time::timeout;

use super::metrics;
use crate::api::server;
use crate::daemon::Shared;

/// Bytes of a request; Prometheus sends some hundred.
const LARGEST: usize = 8 * 1024;
/// Clients at once.
const CLIENTS: usize = 4;
/// For a request to come, and for the answer to go.
const CLIENT_TIME: Duration = Duration::from_secs(5);

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    Tcp(SocketAddr),
    /// A socket of its own, for root only.
    Unix(PathBuf),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with('/') {
            return Ok(Place::Unix(text.into()));
        }
        text.parse().map(Place::Tcp).map_err(|_| {
            format!(
                "`{text}` is neither an address with a port, such as 127.0.0.1:9464, nor an absolute path"
            )
        })
    }
}

/// A listening socket.
#[derive(Debug)]
pub enum Door {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Door {
    /// Binds it.
    pub async fn open(place: &Place) -> anyhow::Result<Self> {
        match place {
            Place::Tcp(address) => {
                let listener = TcpListener::bind(address).await;
                listener.map(Door::Tcp).with_context(|| format!("--metrics {address}"))
            }
            Place::Unix(path) => server::bind(path).map(Door::Unix),
        }
    }
}

/// Serves until the daemon ends.
pub async fn serve(door: Door, shared: Arc<Shared>) {
    let clients = Arc::new(Semaphore::new(CLIENTS));
    let one = Arc::new(Mutex::new(()));
    loop {
        let Ok(permit) = Arc::clone(&clients).acquire_owned().await else { return };
        let (shared, one) = (Arc::clone(&shared), Arc::clone(&one));
        // Boxed, since the two have nothing else in common.
        let client: io::Result<Box<dyn Stream>> = match &door {
            Door::Tcp(listener) => {
                listener.accept().await.map(|(client, _)| Box::new(client) as Box<dyn Stream>)
            }
            Door::Unix(listener) => {
                listener.accept().await.map(|(client, _)| Box::new(client) as Box<dyn Stream>)
            }
        };
        match client {
            Ok(client) => {
                tokio::spawn(async move {
                    // Whoever goes away early is no concern of ours.
                    let _ = talk(client, &shared, &one).await;
                    drop(permit);
                });
            }
            Err(error) => {
                log::debug!("metrics: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// What a client is.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

async fn talk(mut client: Box<dyn Stream>, shared: &Arc<Shared>, one: &Mutex<()>) -> io::Result<()> {
    let request = timeout(CLIENT_TIME, request(&mut client)).await??;
    let (status, kind, body) = match asked(&request) {
        Ok(()) => {
            // One look at the flow tables at a time, however many ask.
            let _turn = one.lock().await;
            let shared = Arc::clone(shared);
            match tokio::task::spawn_blocking(move || metrics::text(&shared)).await {
                Ok(Ok(text)) => ("200 OK", metrics::CONTENT_TYPE, text),
                Ok(Err(error)) => failed(&format!("{error:#}")),
                Err(error) => failed(&error.to_string()),
            }
        }
        Err((status, said)) => (status, "text/plain", format!("{said}\n").into_bytes()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let answer = async {
        client.write_all(head.as_bytes()).await?;
        client.write_all(&body).await?;
        client.shutdown().await
    };
    timeout(CLIENT_TIME, answer).await?
}

fn failed(error: &str) -> (&'static str, &'static str, Vec<u8>) {
    log::warn!("metrics: {error}");
    ("500 Internal Server Error", "text/plain", format!("{error}\n").into_bytes())
}

/// Reads up to the end of the request's head, or as much as it may have.
async fn request(client: &mut Box<dyn Stream>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while bytes.len() < LARGEST && !bytes.windows(4).any(|end| end == b"\r\n\r\n") {
        let mut chunk = [0; 1024];
        let n = client.read(&mut chunk).await?;
        if n == 0 {
            break;
        }
        bytes.extend(&chunk[..n]);
    }
    Ok(bytes)
}

/// Is it a request for the metrics? Else the status and what to say.
fn asked(request: &[u8]) -> Result<(), (&'static str, &'static str)> {
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let line = std::str::from_utf8(line).map_err(|_| ("400 Bad Request", "not HTTP"))?;
    let mut words = line.split(' ');
    let (method, target, version) = (words.next(), words.next(), words.next());
    if !version.is_some_and(|version| version.starts_with("HTTP/1.")) || words.next().is_some() {
        return Err(("400 Bad Request", "not HTTP/1.1"));
    }
    if !request.windows(4).any(|end| end == b"\r\n\r\n") {
        return Err(("431 Request Header Fields Too Large", "a request has at most 8 KiB, and ends"));
    }
    if method != Some("GET") {
        return Err(("405 Method Not Allowed", "only GET"));
    }
    match target.map(|target| target.split('?').next().unwrap_or_default()) {
        Some("/metrics") => Ok(()),
        _ => Err(("404 Not Found", "the metrics are at /metrics")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_get_of_the_metrics_is_answered_whatever_the_bytes_are() {
        assert_eq!(asked(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"), Ok(()));
        assert_eq!(asked(b"GET /metrics?x=1 HTTP/1.0\r\n\r\n"), Ok(()));
        let status = |bytes: &[u8]| asked(bytes).unwrap_err().0[..3].to_owned();
        assert_eq!(status(b"GET / HTTP/1.1\r\n\r\n"), "404");
        assert_eq!(status(b"POST /metrics HTTP/1.1\r\n\r\n"), "405");
        assert_eq!(status(b"GET /metrics HTTP/1.1\r\nHost: a"), "431");
        for wrong in [
            &b""[..],
            b"\r\n\r\n",
            b"GET",
            b"GET /metrics",
            b"\xff\xfe HTTP/1.1\r\n\r\n",
            b"GET /a b HTTP/1.1\r\n\r\n",
        ] {
            assert_eq!(status(wrong), "400", "{wrong:?}");
        }
    }

    #[test]
    fn a_place_is_an_address_with_a_port_or_an_absolute_path() {
        assert_eq!("127.0.0.1:9464".parse(), Ok(Place::Tcp(([127, 0, 0, 1], 9464).into())));
        assert_eq!("/run/metrics.sock".parse(), Ok(Place::Unix("/run/metrics.sock".into())));
        assert!("[::1]:9464".parse::<Place>().is_ok());
        for wrong in ["9464", "localhost:9464", "", "metrics.sock"] {
            assert!(wrong.parse::<Place>().unwrap_err().contains("neither"), "{wrong}");
        }
    }
}
