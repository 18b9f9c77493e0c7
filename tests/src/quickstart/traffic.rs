//! Traffic for the live view, so that something moves: what the steps have shown, over and over.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::plan::{FRONTEND, INSTANCE, Party, SERVER, VM2, VM3};
use super::stand::Stand;
use crate::lab::{Namespace, TcpEcho, TcpHold, UdpEcho, ping, tcp_exchange, udp_exchange};

/// Nobody answers what is denied, so nobody waits for it.
const BRIEFLY: Duration = Duration::from_millis(150);
const LIMIT: Duration = Duration::from_secs(1);
/// How often a thread looks whether it is to stop.
const GLANCE: Duration = Duration::from_millis(50);

/// Traffic that goes on until this is dropped.
pub(super) struct Traffic {
    stop: Arc<AtomicBool>,
    senders: Vec<JoinHandle<()>>,
    _held: TcpHold,
    _servers: (Vec<TcpEcho>, UdpEcho),
}

impl Traffic {
    pub fn start(stand: &Stand) -> anyhow::Result<Self> {
        let [vm1, vm2, vm3] = ["vm1", "vm2", "vm3"].map(|guest| stand.namespace(Party::Guest(guest)));
        let internet = stand.namespace(Party::Internet);
        let tcp = vec![
            TcpEcho::start(internet, at(SERVER, 443))?,
            TcpEcho::start(vm2, at(VM2, 8080))?,
            TcpEcho::start(vm3, at(VM3, 443))?,
            TcpEcho::start(vm3, at(VM3, 5432))?,
        ];
        let udp = UdpEcho::start(internet, at(SERVER, 53))?;
        let held = TcpHold::open(vm1, at(SERVER, 443), 3, LIMIT)?;
        let mut traffic =
            Traffic { stop: Arc::default(), senders: Vec::new(), _held: held, _servers: (tcp, udp) };
        // Closed connections keep their port for four minutes, so a second apart no guest runs out of its thousand.
        traffic.tcp(vm1, at(SERVER, 443), 64 << 10, 1000)?;
        traffic.tcp(vm2, at(SERVER, 443), 4 << 10, 1500)?;
        traffic.tcp(vm1, at(VM2, 8080), 16 << 10, 1100)?;
        traffic.tcp(vm1, at(VM3, 5432), 8 << 10, 700)?;
        traffic.tcp(vm3, at(SERVER, 443), 2 << 10, 1300)?;
        traffic.tcp(internet, at(INSTANCE, 443), 32 << 10, 900)?;
        traffic.tcp(vm1, at(SERVER, 25), 1, 1700)?;
        traffic.tcp(vm1, at(VM3, 22), 1, 2300)?;
        traffic.tcp(internet, at(INSTANCE, 22), 1, 600)?;
        traffic.tcp(internet, at(FRONTEND, 80), 1, 1900)?;
        traffic.udp(vm1, at(SERVER, 53), 120)?;
        traffic.udp(vm2, at(SERVER, 53), 250)?;
        traffic.udp(vm2, at(SERVER, 5353), 800)?;
        traffic.spawn(vm1, 1000, |vm1, _| {
            let _ = ping(vm1, SERVER.into(), 1, BRIEFLY);
        })?;
        Ok(traffic)
    }

    fn tcp(&mut self, from: &Namespace, to: SocketAddr, bytes: usize, every: u64) -> anyhow::Result<()> {
        let payload = vec![0x50; bytes];
        // One byte is for what is denied.
        let limit = if bytes == 1 { BRIEFLY } else { LIMIT };
        self.spawn(from, every, move |from, _| {
            let _ = tcp_exchange(from, None, to, &payload, limit);
        })
    }

    fn udp(&mut self, from: &Namespace, to: SocketAddr, every: u64) -> anyhow::Result<()> {
        // Few ports in turn: each keeps its public one for four minutes.
        self.spawn(from, every, move |from, turn| {
            let _ = udp_exchange(from, Some(40_000 + turn % 16), to, &[0x50; 200], BRIEFLY);
        })
    }

    fn spawn(
        &mut self,
        from: &Namespace,
        every: u64,
        send: impl Fn(&Namespace, u16) + Send + 'static,
    ) -> anyhow::Result<()> {
        let (from, stop, every) = (from.clone(), Arc::clone(&self.stop), Duration::from_millis(every));
        let thread = std::thread::Builder::new().name("quickstart".to_owned());
        self.senders.push(thread.spawn(move || {
            let mut turn = 0;
            while !stop.load(Ordering::Relaxed) {
                let next = Instant::now() + every;
                send(&from, turn);
                turn = turn.wrapping_add(1);
                while Instant::now() < next && !stop.load(Ordering::Relaxed) {
                    std::thread::sleep(GLANCE.min(next.saturating_duration_since(Instant::now())));
                }
            }
        })?);
        Ok(())
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for sender in self.senders.drain(..) {
            // A sender that panicked has said so; the lab goes all the same.
            let _ = sender.join();
        }
    }
}

fn at(address: Ipv4Addr, port: u16) -> SocketAddr {
    (address, port).into()
}
