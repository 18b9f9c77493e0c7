//! One probe of one backend. What a backend sends is hostile: bounded in bytes and in time.

use std::fmt;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::Target;
use crate::policy::network::ProbeProtocol;

/// Azure's limit for the answer to an HTTP probe (`reference/azure.md` §3).
const HTTP_LIMIT: Duration = Duration::from_secs(30);
/// A status line longer than this is none.
const STATUS_LINE: usize = 1024;
/// What is read of the rest, so that the backend sees its answer taken, and for how long.
const REST: usize = 65_536;
const REST_LIMIT: Duration = Duration::from_secs(1);

/// Why a probe failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Failure {
    /// To the SYN within the interval, to the GET within 30 s.
    NoAnswer,
    Refused,
    /// Any but 200.
    Http(u16),
    /// Something answers that does not speak HTTP.
    NotHttp,
    /// What this host's kernel said: the backend is not to blame, and is taken out all the same.
    Here(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoAnswer => f.write_str("no answer"),
            Self::Refused => f.write_str("connection refused"),
            Self::Http(status) => write!(f, "HTTP {status}"),
            Self::NotHttp => f.write_str("the answer is not HTTP"),
            Self::Here(error) => write!(f, "not sent: {error}"),
        }
    }
}

/// Probes a backend once, from the calling thread's network namespace.
pub async fn check(target: &Target) -> Result<(), Failure> {
    match &target.protocol {
        // The handshake is all (RFC 9293 §3.5); then it is closed in good order.
        ProbeProtocol::Tcp => timed(target.interval, connect(target)).await.map(drop),
        ProbeProtocol::Http { path } => {
            // Whoever does not even accept need not be waited for as long as a slow answer.
            let stream = timed(target.interval, connect(target)).await?;
            timed(HTTP_LIMIT, get(stream, path, target.address.into())).await
        }
    }
}

async fn timed<T>(limit: Duration, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    timeout(limit, work).await.unwrap_or(Err(Failure::NoAnswer))
}

async fn connect(target: &Target) -> Result<TcpStream, Failure> {
    let here = |error: std::io::Error| Failure::Here(error.to_string());
    let socket = TcpSocket::new_v4().map_err(here)?;
    // The same address may be a backend in several networks.
    socket.bind_device(Some(target.device.as_bytes())).map_err(here)?;
    socket.connect(target.address.into()).await.map_err(|error| match error.kind() {
        ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset => Failure::Refused,
        ErrorKind::TimedOut | ErrorKind::HostUnreachable => Failure::NoAnswer,
        _ => Failure::Here(error.to_string()),
    })
}

/// GET, answered 200.
async fn get(mut stream: TcpStream, path: &str, host: SocketAddr) -> Result<(), Failure> {
    let lost = |error: std::io::Error| match error.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Failure::Refused,
        _ => Failure::NoAnswer,
    };
    stream.write_all(&request(path, host)).await.map_err(lost)?;
    let mut line = Vec::new();
    let mut chunk = [0; 512];
    while !line.contains(&b'\n') && line.len() < STATUS_LINE {
        match stream.read(&mut chunk).await.map_err(lost)? {
            0 => break,
            read => line.extend_from_slice(&chunk[..read]),
        }
    }
    let status = status(&line).ok_or(if line.is_empty() { Failure::NoAnswer } else { Failure::NotHttp })?;
    // Closed with something unread, the connection would end in a RST.
    let rest = async {
        let mut left = REST;
        while left > 0 && matches!(stream.read(&mut chunk).await, Ok(read) if read > 0) {
            left = left.saturating_sub(chunk.len());
        }
    };
    let _ = timeout(REST_LIMIT, rest).await;
    if status == 200 { Ok(()) } else { Err(Failure::Http(status)) }
}

/// The request. A path that would end the line is made one that does not.
fn request(path: &str, host: SocketAddr) -> Vec<u8> {
    let mut request = b"GET ".to_vec();
    for byte in path.bytes() {
        match byte {
            0..=b' ' | 0x7f => request.extend_from_slice(format!("%{byte:02X}").as_bytes()),
            _ => request.push(byte),
        }
    }
    let headers = format!(
        " HTTP/1.1\r\nHost: {host}\r\nUser-Agent: portcullis\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    );
    request.extend_from_slice(headers.as_bytes());
    request
}

/// The status of `HTTP/1.1 200 OK` (RFC 9112 §4).
fn status(line: &[u8]) -> Option<u16> {
    let rest = line.strip_prefix(b"HTTP/1.")?;
    let (version, rest) = rest.split_first_chunk::<2>()?;
    let (digits, rest) = rest.split_first_chunk::<3>()?;
    let ends = matches!(rest.first(), None | Some(b' ' | b'\r' | b'\n'));
    let number = version[0].is_ascii_digit() && version[1] == b' ' && digits.iter().all(u8::is_ascii_digit);
    (number && ends).then(|| digits.iter().fold(0, |sum, digit| sum * 10 + u16::from(digit - b'0')))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{SocketAddrV4, TcpListener};

    use super::*;

    fn target(address: SocketAddrV4, protocol: ProbeProtocol) -> Target {
        let device = "lo".into();
        let interval = Duration::from_millis(300);
        Target { name: "t".into(), device, address, protocol, interval, threshold: 1 }
    }

    fn http() -> ProbeProtocol {
        ProbeProtocol::Http { path: "/health".into() }
    }

    fn probe(target: &Target) -> Result<(), Failure> {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(check(target))
    }

    /// Answers one connection with these bytes and closes it; what it was sent.
    fn answering(bytes: &'static [u8]) -> (SocketAddrV4, std::thread::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let std::net::SocketAddr::V4(address) = listener.local_addr().unwrap() else { unreachable!() };
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = vec![0; 1024];
            let read = stream.read(&mut asked).unwrap();
            // The prober may have seen enough.
            let _ = stream.write_all(bytes);
            String::from_utf8_lossy(&asked[..read]).into_owned()
        });
        (address, thread)
    }

    #[test]
    fn an_http_probe_takes_200_and_nothing_else() {
        let cases: [(&[u8], Result<(), Failure>); 7] = [
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", Ok(())),
            (b"HTTP/1.0 200\n", Ok(())),
            (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", Err(Failure::Http(503))),
            (b"HTTP/1.1 204 No Content\r\n\r\n", Err(Failure::Http(204))),
            (b"SSH-2.0-OpenSSH_9.6\r\n", Err(Failure::NotHttp)),
            (b"HTTP/1.1 2000 OK\r\n", Err(Failure::NotHttp)),
            (b"", Err(Failure::NoAnswer)),
        ];
        for (answer, expected) in cases {
            let (address, server) = answering(answer);
            assert_eq!(probe(&target(address, http())), expected, "{}", String::from_utf8_lossy(answer));
            let asked = server.join().unwrap();
            assert!(asked.starts_with(&format!("GET /health HTTP/1.1\r\nHost: {address}\r\n")), "{asked}");
            assert!(asked.contains("\r\nConnection: close\r\n"), "{asked}");
        }
    }

    #[test]
    fn a_backend_that_floods_or_never_ends_its_line_is_not_read_for_ever() {
        static FLOOD: [u8; 4_000_000] = [b'x'; 4_000_000];
        let (address, server) = answering(&FLOOD);
        assert_eq!(probe(&target(address, http())), Err(Failure::NotHttp));
        server.join().unwrap();
    }

    #[test]
    fn a_tcp_probe_takes_a_handshake_and_tells_refusal_from_silence() {
        let (address, server) = answering(b"");
        assert_eq!(probe(&target(address, ProbeProtocol::Tcp)), Ok(()));
        drop(server);
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let std::net::SocketAddr::V4(free) = free else { unreachable!() };
        assert_eq!(probe(&target(free, ProbeProtocol::Tcp)), Err(Failure::Refused));
    }

    #[test]
    fn a_path_cannot_smuggle_a_second_request() {
        let bytes = request("/a b\r\nX: y", "10.0.0.4:80".parse().unwrap());
        assert!(bytes.starts_with(b"GET /a%20b%0D%0AX:%20y HTTP/1.1\r\nHost: 10.0.0.4:80\r\n"));
    }
}
