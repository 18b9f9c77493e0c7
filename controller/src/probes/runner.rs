//! The thread that probes, in a network namespace of its own.

use std::collections::HashMap;
use std::fs::File;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use anyhow::Context as _;
use nix::sched::{CloneFlags, unshare};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::check::check;
use super::health::Book;
use super::targets::Target;
use crate::hosts::Host;
use crate::privileges::{give_up_here, privileged};

/// Backends that go down together are taken out together.
const TOGETHER: Duration = Duration::from_millis(20);

/// Tells whoever forwards packets that the book says something else now.
pub type Publish = Arc<dyn Fn() + Send + Sync>;

/// What the thread is told.
pub enum Order {
    /// A device has come into the namespace: give it address and routes.
    Equip { device: String, done: oneshot::Sender<anyhow::Result<()>> },
    /// Probe these and no others from now on.
    Follow { targets: Vec<Target>, publish: Publish },
}

/// The thread, for as long as this lives. With it the namespace goes, and the devices in it.
pub struct Runner {
    pub orders: mpsc::UnboundedSender<Order>,
    /// The namespace, to put devices into.
    pub namespace: File,
}

impl Runner {
    /// Makes namespace and thread.
    pub fn start(book: Arc<Book>) -> anyhow::Result<Self> {
        let (orders, commands) = mpsc::unbounded_channel();
        let (ready, made): (SyncSender<anyhow::Result<File>>, Receiver<_>) = sync_channel(1);
        let probing = move || {
            let runtime = match enter() {
                Ok((namespace, runtime)) => {
                    let _ = ready.send(Ok(namespace));
                    runtime
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                    return;
                }
            };
            runtime.block_on(work(commands, book));
        };
        // A thread has the capabilities of the one that starts it, and a namespace needs one of those that are given up.
        privileged(|| std::thread::Builder::new().name("probes".to_owned()).spawn(probing))
            .context("starting the thread that probes")?;
        let namespace = made.recv().context("the thread that probes")??;
        Ok(Self { orders, namespace })
    }
}

/// Puts the calling thread into a namespace of its own.
fn enter() -> anyhow::Result<(File, tokio::runtime::Runtime)> {
    unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace for health probes")?;
    give_up_here().context("giving up capabilities")?;
    let namespace =
        File::open("/proc/thread-self/ns/net").context("opening the probes' network namespace")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok((namespace, runtime))
}

async fn work(mut orders: mpsc::UnboundedReceiver<Order>, book: Arc<Book>) {
    let changed = Arc::new(Notify::new());
    let mut tasks: HashMap<String, (Target, JoinHandle<()>)> = HashMap::new();
    let mut publish: Option<Publish> = None;
    loop {
        tokio::select! {
            order = orders.recv() => match order {
                None => return,
                Some(Order::Equip { device, done }) => {
                    let outcome = async { Host::open()?.equip_prober(&device).await }.await;
                    // Who asked may have gone.
                    let _ = done.send(outcome);
                }
                Some(Order::Follow { targets, publish: how }) => {
                    publish = Some(how);
                    follow(targets, &book, &changed, &mut tasks);
                }
            },
            () = changed.notified() => {
                sleep(TOGETHER).await;
                let (book, publish) = (Arc::clone(&book), publish.clone());
                // It may wait for a change of policy to be over, which no probe should.
                let told = tokio::task::spawn_blocking(move || {
                    if let Some(publish) = publish {
                        publish();
                    }
                    book.save()
                });
                if let Ok(Err(error)) = told.await {
                    log::warn!("the health of backends will not outlive a restart: {error}");
                }
            }
        }
    }
}

/// One task for each target; those that stay as they are go on undisturbed.
fn follow(
    targets: Vec<Target>,
    book: &Arc<Book>,
    changed: &Arc<Notify>,
    tasks: &mut HashMap<String, (Target, JoinHandle<()>)>,
) {
    book.keep(targets.iter().map(|target| target.name.as_str()));
    let mut before = std::mem::take(tasks);
    for target in targets {
        let task = match before.remove(&target.name) {
            Some((known, task)) if known == target && !task.is_finished() => task,
            other => {
                if let Some((_, task)) = other {
                    task.abort();
                }
                tokio::spawn(probe(target.clone(), Arc::clone(book), Arc::clone(changed)))
            }
        };
        tasks.insert(target.name.clone(), (target, task));
    }
    before.into_values().for_each(|(_, task)| task.abort());
}

/// Probes one backend, for ever. The first time after a part of the interval, so that a thousand do not come at once.
async fn probe(target: Target, book: Arc<Book>, changed: Arc<Notify>) {
    let part = f64::from(RandomState::new().build_hasher().finish() as u32) / f64::from(u32::MAX);
    sleep(target.interval.mul_f64(part)).await;
    let mut ticks = interval(target.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let result = check(&target).await;
        let Some(health) = book.note(&target, result) else { continue };
        match &health.why {
            None => log::info!("{} is up: new flows go there", target.name),
            Some(why) => log::warn!("{} is down: {why}; no new flows go there", target.name),
        }
        changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
    use std::time::Instant;

    use super::*;
    use crate::hosts::testing::{Scratch, needs_root};
    use crate::policy::network::ProbeProtocol;

    fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
        let until = Instant::now() + Duration::from_secs(10);
        while !condition() {
            assert!(Instant::now() < until, "{what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// In the namespace of the runner; its loopback is down until somebody ups it.
    fn inside<T: Send + 'static>(runner: &Runner, work: impl FnOnce() -> T + Send + 'static) -> T {
        let namespace = runner.namespace.try_clone().unwrap();
        std::thread::spawn(move || {
            nix::sched::setns(&namespace, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
        .join()
        .unwrap()
    }

    #[test]
    fn a_thousand_backends_are_probed_at_their_interval_and_one_that_dies_is_told() {
        if !needs_root() {
            return;
        }
        let directory = Scratch::new();
        let book = Arc::new(Book::open(&directory.0));
        let runner = Runner::start(Arc::clone(&book)).unwrap();
        let listener = inside(&runner, || {
            let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
            assert!(up.success());
            TcpListener::bind("0.0.0.0:8080").unwrap()
        });
        let accepted = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&accepted);
        let alive = listener.try_clone().unwrap();
        let server = std::thread::spawn(move || {
            while alive.accept().is_ok() {
                counter.fetch_add(1, SeqCst);
            }
        });
        let target = |i: u32| Target {
            name: format!("lb/probes/alive/vm{i}/ip"),
            device: "lo".into(),
            address: std::net::SocketAddrV4::new((0x7f00_0000 + i + 1).into(), 8080),
            protocol: ProbeProtocol::Tcp,
            interval: Duration::from_secs(1),
            threshold: 2,
        };
        let published = Arc::new(AtomicU32::new(0));
        let publish: Publish = {
            let published = Arc::clone(&published);
            Arc::new(move || _ = published.fetch_add(1, SeqCst))
        };
        let targets: Vec<Target> = (0..1000).map(target).collect();
        runner
            .orders
            .send(Order::Follow { targets: targets.clone(), publish: publish.clone() })
            .ok()
            .unwrap();
        let began = Instant::now();
        eventually("three rounds", || accepted.load(SeqCst) >= 3000);
        let (seen, took) = (accepted.load(SeqCst), began.elapsed());
        println!("{seen} probes of 1,000 backends in {took:?}, with an interval of 1 s");
        // Each at once or later, and then once in a second.
        assert!(u64::from(seen) <= 1000 * (took.as_secs() + 2), "{seen} probes in {took:?}");
        assert!(book.down().is_empty() && published.load(SeqCst) == 0);

        // Nobody listens any more: refused.
        // SAFETY: the descriptor is the listener's, which lives.
        unsafe { libc::shutdown(std::os::fd::AsRawFd::as_raw_fd(&listener), libc::SHUT_RDWR) };
        drop(listener);
        server.join().unwrap();
        eventually("all are down", || book.down().len() == 1000);
        eventually("published", || published.load(SeqCst) > 0);
        assert_eq!(book.of(&targets[7].name).unwrap().why, Some(super::super::Failure::Refused));
        eventually("saved", || Book::open(&directory.0).down().len() == 1000);
        runner.orders.send(Order::Follow { targets: targets[..1].to_vec(), publish }).ok().unwrap();
        eventually("forgotten", || book.down().len() == 1);
    }
}
