//! The daemon's end of the control socket.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::sys::stat::{Mode, umask};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::{Failure, MAX_REQUEST, Reply, Request, parse};

/// Clients connected at once; the next ones wait in the socket's queue. Those that send slowly cost a line's bytes each.
const CLIENTS: usize = 256;
/// Questions answered at once, which cost more. Who waits for one to be free has sent its line.
const ANSWERS: usize = 16;
/// For a client to send its line, and to take the next part of the answer.
const CLIENT_TIME: Duration = Duration::from_secs(10);
/// For it to take all of the answer.
const TAKING_TIME: Duration = Duration::from_secs(120);
/// For the answer to be made.
const ANSWER_TIME: Duration = Duration::from_secs(110);

/// Answers questions.
pub trait Answer: Send + Sync + 'static {
    /// The answer to one question.
    fn answer(&self, request: Request) -> impl Future<Output = Result<Value, Failure>> + Send;
}

/// Binds the socket: mode 0600 from its first moment, in place of one that a killed daemon left.
///
/// The caller holds the daemon's lock, so whatever stands at `path` belongs to nobody that lives.
pub fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
            .with_context(|| format!("making {}", directory.display()))?;
    }
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {
            fs::remove_file(path).with_context(|| format!("removing the old {}", path.display()))?;
        }
        Ok(_) => bail!("{} is there and is no socket: remove it, or choose another --socket", path.display()),
        Err(_) => {}
    }
    let before = umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    umask(before);
    let listener = listener.with_context(|| format!("listening at {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .with_context(|| format!("protecting {}", path.display()))?;
    Ok(listener)
}

/// Serves until the task is dropped.
pub async fn serve(listener: UnixListener, answers: Arc<impl Answer>) {
    let room = Arc::new(Semaphore::new(CLIENTS));
    let at_work = Arc::new(Semaphore::new(ANSWERS));
    loop {
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (answers, at_work) = (Arc::clone(&answers), Arc::clone(&at_work));
                tokio::spawn(async move {
                    if let Err(error) = converse(stream, &*answers, &at_work).await {
                        log::debug!("control socket: {error}");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: clients end and give theirs back.
                log::warn!("control socket: accept: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(mut stream: UnixStream, answers: &impl Answer, at_work: &Semaphore) -> io::Result<()> {
    // Held until the answer has been taken: it is in memory until then.
    let mut turn = None;
    let outcome = match stream.peer_cred() {
        Ok(who) if who.uid() == 0 => {
            let mut line = Vec::new();
            // One byte more than is allowed, so that too long a line is told from one that fits.
            let mut reader = BufReader::new(&mut stream).take(MAX_REQUEST as u64 + 1);
            match timeout(CLIENT_TIME, reader.read_until(b'\n', &mut line)).await {
                // Somebody only looked whether we are here.
                Ok(Ok(0)) => return Ok(()),
                Ok(Ok(_)) => match parse(&line) {
                    Ok(request) => {
                        let answer = async {
                            turn = at_work.acquire().await.ok();
                            answers.answer(request).await
                        };
                        timeout(ANSWER_TIME, answer).await.unwrap_or_else(|_| {
                            Err(Failure::failed(&anyhow::anyhow!("this took too long; see the daemon's log")))
                        })
                    }
                    Err(failure) => Err(failure),
                },
                Ok(Err(error)) => return Err(error),
                Err(_) => Err(Failure::input("no request came")),
            }
        }
        Ok(who) => Err(Failure::input(format!("only root may ask, not user {}", who.uid()))),
        Err(error) => Err(Failure::failed(&anyhow::Error::new(error).context("asking who you are"))),
    };
    let line = Reply::line(outcome);
    // A client may be slow to take a long answer, but not silent: each part has its own time, and all of them an end.
    let taking = async {
        for part in line.chunks(1 << 16) {
            timeout(CLIENT_TIME, stream.write_all(part)).await.map_err(|_| io::ErrorKind::TimedOut)??;
        }
        stream.shutdown().await
    };
    let taken = timeout(TAKING_TIME, taking).await.map_err(|_| io::ErrorKind::TimedOut)?;
    drop(turn);
    taken
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream as Client;

    use serde_json::json;

    use super::*;
    use crate::api::{ErrorKind, client};

    /// Answers with what it was asked.
    struct Echo;

    impl Answer for Echo {
        async fn answer(&self, request: Request) -> Result<Value, Failure> {
            match request {
                Request::Status => Ok(json!({ "asked": "status" })),
                other => Err(Failure::input(format!("{other:?}"))),
            }
        }
    }

    fn with_server(name: &str, test: impl FnOnce(&Path) + Send + 'static) {
        let directory = std::env::temp_dir().join(format!("pcd-socket-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        let path = directory.join("control.sock");
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let server = tokio::spawn(serve(bind(&path).unwrap(), Arc::new(Echo)));
            tokio::task::spawn_blocking(move || test(&path)).await.unwrap();
            server.abort();
        });
        fs::remove_dir_all(&directory).unwrap();
    }

    fn is_root() -> bool {
        nix::unistd::geteuid().is_root()
    }

    #[test]
    fn a_question_is_answered_and_a_refusal_comes_back_as_one() {
        with_server("answer", |path| {
            let answer = client::ask(path, &Request::Status).unwrap();
            if !is_root() {
                assert!(answer.unwrap_err().message.contains("only root"));
                return;
            }
            assert_eq!(answer.unwrap()["asked"], "status");
            let refusal =
                client::ask(path, &Request::Snat { guest: None, frontend: None }).unwrap().unwrap_err();
            assert_eq!(
                (refusal.kind, refusal.message.as_str()),
                (ErrorKind::Input, "Snat { guest: None, frontend: None }")
            );
        });
    }

    #[test]
    fn garbage_long_lines_and_silent_clients_hurt_nobody_else() {
        use std::io::{Read as _, Write as _};

        with_server("garbage", |path| {
            // More than are answered at once.
            let silent: Vec<Client> = (0..2 * ANSWERS).map(|_| Client::connect(path).unwrap()).collect();
            for bytes in
                [vec![0xff; 300], vec![b'x'; MAX_REQUEST * 3], b"\n".to_vec(), b"{\"command\":7}\n".to_vec()]
            {
                let mut client = Client::connect(path).unwrap();
                // The daemon may have answered and gone before all of it is written.
                let _ = client.write_all(&bytes);
                let _ = client.shutdown(std::net::Shutdown::Write);
                let mut answer = String::new();
                let _ = client.read_to_string(&mut answer);
                assert!(answer.starts_with("{\"ok\":false"), "{answer:?}");
            }
            assert!(client::ask(path, &Request::Status).is_ok());
            drop(silent);
        });
    }

    #[test]
    fn the_socket_is_for_its_owner_only_and_replaces_a_dead_one_but_no_file() {
        with_server("mode", |path| {
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
            let file = path.with_file_name("file");
            fs::write(&file, "").unwrap();
            assert!(bind(&file).unwrap_err().to_string().contains("no socket"));
            let dead = path.with_file_name("dead");
            drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
            let error = client::ask(&dead, &Request::Status).unwrap_err().to_string();
            assert!(error.contains("portcullis run"), "{error}");
        });
    }
}
