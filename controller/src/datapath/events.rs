//! Events and log lines that the programs send: two ring buffers, read without blocking.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use anyhow::Context as _;
use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use portcullis_common::layout::Event;
use tokio::io::unix::AsyncFd;

use super::load::Datapath;

/// The sampled drops and exhaustions, oldest first. One reader at a time: what one takes the other misses.
pub struct Events(RingBuf<MapData>);

impl Events {
    /// The next event, if there is one.
    pub fn try_next(&mut self) -> Option<Event> {
        loop {
            let item = self.0.next()?;
            if item.len() >= size_of::<Event>() {
                // SAFETY: that many bytes are there, any bits are a valid event, and the read is unaligned.
                return Some(unsafe { item.as_ptr().cast::<Event>().read_unaligned() });
            }
        }
    }

    /// For waiting with tokio; to be called inside a runtime.
    pub fn into_async(self) -> io::Result<AsyncEvents> {
        // SAFETY: the buffer owns its descriptor, which stays open and the same for its whole life.
        Ok(AsyncEvents(unsafe { AsyncFd::register(self) }?))
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Events to wait for.
pub struct AsyncEvents(AsyncFd<Events>);

impl AsyncEvents {
    /// Waits for the next event. Nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> io::Result<Event> {
        loop {
            let mut guard = self.0.readable_mut().await?;
            match guard.get_inner_mut().try_next() {
                Some(event) => return Ok(event),
                None => guard.clear_ready(),
            }
        }
    }
}

/// Log lines of the programs, for the `log` crate.
pub struct KernelLog(AsyncFd<EbpfLogger<&'static dyn log::Log>>);

impl KernelLog {
    /// Passes lines on as they come, until the future is dropped.
    pub async fn run(mut self) -> io::Result<()> {
        loop {
            let mut guard = self.0.readable_mut().await?;
            guard.get_inner_mut().flush();
            guard.clear_ready();
        }
    }
}

impl Datapath {
    /// Opens the event buffer. It goes on where the last reader stopped, also over a restart.
    pub fn events(&self) -> anyhow::Result<Events> {
        let pin = self.pins.map("EVENTS");
        let map = MapData::from_pin(&pin).with_context(|| format!("BPF_OBJ_GET {}", pin.display()))?;
        let map = aya::maps::Map::RingBuf(map);
        Ok(Events(RingBuf::try_from(map).context("mapping EVENTS")?))
    }

    /// Takes the log of this load's programs; `None` the second time, and if they do not log at all. To be called
    /// inside a tokio runtime.
    pub fn kernel_log(&mut self) -> anyhow::Result<Option<KernelLog>> {
        match EbpfLogger::init(&mut self.ebpf) {
            Ok(logger) => {
                // SAFETY: the logger owns its descriptor, which stays open and the same for its whole life.
                let logger = unsafe { AsyncFd::register(logger) }.context("watching the kernel's log")?;
                Ok(Some(KernelLog(logger)))
            }
            Err(aya_log::Error::MapNotFound) => Ok(None),
            Err(error) => Err(error).context("opening the kernel's log"),
        }
    }
}
