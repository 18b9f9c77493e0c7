//! The probers as the daemon handles them: devices before a policy is compiled, targets once it is in force.

use std::collections::BTreeSet;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use anyhow::Context as _;
use tokio::sync::oneshot;

use super::health::Book;
use super::interface::probers;
use super::runner::{Order, Publish, Runner};
use super::targets::targets;
use crate::hosts::Host;
use crate::policy::network::Network;

/// The probers of this daemon.
pub struct Probers {
    book: Arc<Book>,
    /// `None` until [`Probers::enter`], or until a policy has probes.
    runner: Option<Runner>,
    /// Devices that were made.
    made: BTreeSet<String>,
}

impl Probers {
    /// None yet.
    pub fn new(book: Arc<Book>) -> Self {
        Self { book, runner: None, made: BTreeSet::new() }
    }

    /// Makes the namespace of the probes now, for a policy of later: the daemon cannot once it has given up its
    /// capabilities.
    pub fn enter(&mut self) -> anyhow::Result<()> {
        if self.runner.is_none() {
            self.runner = Some(Runner::start(Arc::clone(&self.book))?);
        }
        Ok(())
    }

    /// Makes the devices a policy needs and that are not there. Call it before the host is looked at to compile it.
    pub async fn prepare(&mut self, host: &Host, network: &Network) -> anyhow::Result<()> {
        let probers = probers(network);
        if probers.is_empty() {
            return Ok(());
        }
        let links = host.links().await?;
        let runner = match &mut self.runner {
            Some(runner) => runner,
            none => none.insert(Runner::start(Arc::clone(&self.book))?),
        };
        for prober in probers {
            let device = prober.device;
            if self.made.contains(&device) && links.get(&device).is_some_and(|link| link.up) {
                continue;
            }
            let make = async {
                // What is left of a daemon that was killed a moment ago, or somebody has taken down.
                host.remove_prober(&device).await?;
                host.make_prober(&device, runner.namespace.as_fd()).await?;
                let (done, outcome) = oneshot::channel();
                runner
                    .orders
                    .send(Order::Equip { device: device.clone(), done })
                    .ok()
                    .context("the thread that probes has ended")?;
                outcome.await.context("the thread that probes has ended")?
            };
            make.await.with_context(|| format!("making {device}, the device of health probes"))?;
            self.made.insert(device);
        }
        Ok(())
    }

    /// A policy is in force: probes what it wants probed, and takes away the devices of others.
    pub async fn follow(&mut self, host: &Host, network: &Network, publish: Publish) {
        let Some(runner) = &self.runner else { return };
        // The thread ends only with this value.
        let _ = runner.orders.send(Order::Follow { targets: targets(network), publish });
        let wanted: BTreeSet<String> = probers(network).into_iter().map(|prober| prober.device).collect();
        for device in self.made.difference(&wanted) {
            if let Err(error) = host.remove_prober(device).await {
                log::warn!("{error:#}");
            }
        }
        self.made.retain(|device| wanted.contains(device));
    }
}
