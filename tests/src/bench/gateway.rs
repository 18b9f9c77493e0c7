//! Who decides about packets that belong to no flow: Portcullis, or nftables with the same rules.

use super::netfilter::Netfilter;
use super::portcullis::Portcullis;
use super::rig::Rig;

pub(super) enum Gateway {
    Portcullis(Box<Portcullis>),
    Netfilter(Box<Netfilter>),
}

impl Gateway {
    pub fn rig(&mut self) -> &mut Rig {
        match self {
            Gateway::Portcullis(made) => &mut made.rig,
            Gateway::Netfilter(made) => &mut made.rig,
        }
    }

    /// Flows that it knows.
    pub fn known(&self) -> anyhow::Result<u32> {
        match self {
            Gateway::Portcullis(made) => Ok(made.known()),
            Gateway::Netfilter(made) => made.known(),
        }
    }

    /// Forgets all flows, and returns when there is room for as many again.
    pub fn flush(&self) -> anyhow::Result<()> {
        match self {
            Gateway::Portcullis(made) => made.flush(),
            Gateway::Netfilter(made) => made.flush(),
        }
    }

    /// Packets that denying lists were asked about: of Portcullis those that it denied.
    pub fn judged(&self) -> anyhow::Result<u64> {
        match self {
            Gateway::Portcullis(made) => made.denied(),
            Gateway::Netfilter(made) => made.fresh(),
        }
    }

    /// What was counted, for error messages.
    pub fn counts(&self) -> String {
        match self {
            Gateway::Portcullis(made) => made.counts(),
            Gateway::Netfilter(_) => String::new(),
        }
    }
}
