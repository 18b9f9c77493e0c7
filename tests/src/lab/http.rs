//! A tiny HTTP server and the real curl.

use std::io::{self, BufRead as _, BufReader, ErrorKind, PipeReader, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::poll::PollFlags;

use super::namespace::Namespace;
use super::server::{Background, lock, wait_ready};
use super::tcp::listen_on;

/// An HTTP/1.1 server that answers every request with the same body; stops when dropped.
#[derive(Debug)]
pub struct HttpServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    _server: Background,
}

#[derive(Debug)]
struct Shared {
    body: String,
    status: AtomicU16,
    requests: Mutex<Vec<(SocketAddr, String)>>,
}

impl HttpServer {
    /// Listens on `address` inside `namespace` and answers 200 with `body`.
    pub fn start(namespace: &Namespace, address: SocketAddr, body: &str) -> anyhow::Result<Self> {
        let listener = namespace.enter(|| listen_on(address))?;
        let address = listener.local_addr()?;
        let shared =
            Shared { body: body.to_owned(), status: AtomicU16::new(200), requests: Mutex::new(Vec::new()) };
        let shared = Arc::new(shared);
        let answering = Arc::clone(&shared);
        let server = Background::spawn("http", move |stop| {
            if let Err(error) = serve(&listener, &stop, &answering) {
                panic!("HTTP server on {address}: {error}");
            }
        })?;
        Ok(HttpServer { address, shared, _server: server })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The status of the answers from now on: for health probes.
    pub fn set_status(&self, status: u16) {
        self.shared.status.store(status, Ordering::Relaxed);
    }

    /// Every request so far: who asked, as seen from here, and the request line (`GET / HTTP/1.1`).
    pub fn requests(&self) -> Vec<(SocketAddr, String)> {
        lock(&self.shared.requests).clone()
    }
}

fn serve(listener: &TcpListener, stop: &PipeReader, shared: &Arc<Shared>) -> io::Result<()> {
    let mut clients = Vec::new();
    loop {
        let ready = wait_ready(&[(stop.as_fd(), PollFlags::POLLIN), (listener.as_fd(), PollFlags::POLLIN)])?;
        if !ready[0].is_empty() {
            break;
        }
        match listener.accept() {
            Ok((stream, peer)) => {
                stream.set_nonblocking(false)?;
                let (handle, shared) = (stream.try_clone()?, Arc::clone(shared));
                let answer = std::thread::spawn(move || {
                    // A client that goes away is the client's business.
                    let _ = answer(&stream, peer, &shared);
                    let _ = stream.shutdown(Shutdown::Both);
                });
                clients.push((handle, answer));
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) => {}
            Err(error) => return Err(error),
        }
        clients.retain(|(_, answer)| !answer.is_finished());
    }
    for (stream, answer) in clients {
        let _ = stream.shutdown(Shutdown::Both);
        let _ = answer.join();
    }
    Ok(())
}

fn answer(mut stream: &TcpStream, peer: SocketAddr, shared: &Shared) -> io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let Some(request) = lines.next().transpose()? else { return Ok(()) };
    lock(&shared.requests).push((peer, request));
    // Bodies of requests are not read: nothing here sends one.
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    let status = shared.status.load(Ordering::Relaxed);
    let body = &shared.body;
    let head = format!(
        "HTTP/1.1 {status} Lab\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())
}

/// What curl got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CurlReply {
    pub status: u16,
    pub body: String,
    /// The client's own address and port, before any translation.
    pub local: SocketAddr,
}

/// Fetches `url` with curl from inside `namespace`, with `options` of curl's before it.
///
/// # Errors
/// If there was no answer within `timeout`; the message is curl's. A status of 500 is an answer.
pub fn curl(
    namespace: &Namespace,
    url: &str,
    timeout: Duration,
    options: &[&str],
) -> anyhow::Result<CurlReply> {
    const FOOTER: &str = "\\n%{http_code} %{local_ip} %{local_port}";
    let limit = format!("{:.3}", timeout.as_secs_f64());
    // No proxy, whatever the environment says; no configuration file.
    let mut arguments = vec!["curl", "-q", "-sS", "--noproxy", "*", "--max-time", &limit, "-w", FOOTER];
    arguments.extend(options);
    arguments.push(url);
    let finished = namespace.output(&arguments, timeout + Duration::from_secs(10))?;
    if !finished.status.success() {
        bail!("curl {url} in {}: {}", namespace.name(), finished.stderr.trim());
    }
    let parsed = finished.stdout.rsplit_once('\n').and_then(|(body, footer)| {
        let mut words = footer.split(' ');
        let status = words.next()?.parse().ok()?;
        let local = SocketAddr::new(words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(CurlReply { status, body: body.to_owned(), local })
    });
    parsed.with_context(|| format!("output of curl: {}", finished.stdout))
}
