//! Packets through the loaded programs without a device: BPF_PROG_TEST_RUN.
//!
//! Redirects are decided but do not happen, and counters and flows change as they would for a real packet.

use anyhow::Context as _;
use aya::programs::{Program, SchedClassifier, Xdp};
use aya::{TestRun as _, TestRunAttrs, TestRunOptions};

use super::load::Datapath;

/// What a program made of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// `XDP_*` or `TC_ACT_*`.
    pub verdict: u32,
    /// The frame as the program left it.
    pub packet: Vec<u8>,
}

/// Room for a program that makes the packet longer.
pub(super) const GROWTH: usize = 256;

/// struct xdp_md of linux/bpf.h.
#[repr(C)]
#[derive(Default, Clone, Copy)]
struct XdpContext {
    data: u32,
    data_end: u32,
    data_meta: u32,
    ingress_ifindex: u32,
    rx_queue_index: u32,
    egress_ifindex: u32,
}

/// The beginning of struct __sk_buff of linux/bpf.h, up to `ifindex`; the kernel takes the rest as zero.
#[repr(C)]
#[derive(Default, Clone, Copy)]
struct SkbContext {
    length: u32,
    packet_type: u32,
    mark: u32,
    queue_mapping: u32,
    protocol: u32,
    vlan_present: u32,
    vlan_tci: u32,
    vlan_proto: u32,
    priority: u32,
    ingress_ifindex: u32,
    ifindex: u32,
}

/// # Safety
/// `T` has no padding.
unsafe fn bytes<T>(value: &T) -> &[u8] {
    // SAFETY: the caller vouches for every byte being initialised.
    unsafe { std::slice::from_raw_parts((&raw const *value).cast(), size_of::<T>()) }
}

impl Datapath {
    /// Runs `pc_xdp` on a frame as if received on device `ifindex` of this network namespace (0: the loopback).
    pub fn run_xdp(&self, packet: &[u8], ifindex: u32) -> anyhow::Result<Outcome> {
        let context = xdp_context(packet, ifindex);
        // SAFETY: six words, no padding.
        let context = (ifindex != 0).then(|| unsafe { bytes(&context) });
        let mut out = vec![0; packet.len() + GROWTH];
        let options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: context,
            ..TestRunOptions::default()
        };
        let result = self.xdp()?.test_run(options).context("BPF_PROG_TEST_RUN pc_xdp")?;
        out.truncate(result.data_size_out as usize);
        Ok(Outcome { verdict: result.return_value, packet: out })
    }

    /// Runs `pc_xdp` on the same frame `repeat` times and says how long one run took on average. What the program wrote
    /// into the frame stays in it from one run to the next.
    pub fn time_xdp(
        &self,
        packet: &[u8],
        ifindex: u32,
        repeat: u32,
    ) -> anyhow::Result<(Outcome, std::time::Duration)> {
        let context = xdp_context(packet, ifindex);
        let mut out = vec![0; packet.len() + GROWTH];
        let options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            // SAFETY: six words, no padding.
            ctx_in: Some(unsafe { bytes(&context) }),
            repeat,
            ..TestRunOptions::default()
        };
        let result = self.xdp()?.test_run(options).context("BPF_PROG_TEST_RUN pc_xdp")?;
        out.truncate(result.data_size_out as usize);
        Ok((Outcome { verdict: result.return_value, packet: out }, result.duration))
    }

    /// Runs `pc_tc` on a frame as if received on device `ifindex` of this network namespace (0: the loopback).
    pub fn run_tc(&self, packet: &[u8], ifindex: u32) -> anyhow::Result<Outcome> {
        self.run_classifier("pc_tc", packet, ifindex, 0)
    }

    /// Runs any TC program (`pc_tc`, `pc_host`, `pc_guard`) on a frame on device `ifindex` carrying this mark.
    pub fn run_classifier(
        &self,
        program: &str,
        packet: &[u8],
        ifindex: u32,
        mark: u32,
    ) -> anyhow::Result<Outcome> {
        let context = SkbContext { mark, ifindex, ..SkbContext::default() };
        let mut out = vec![0; packet.len() + GROWTH];
        let options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            // SAFETY: eleven words, no padding.
            ctx_in: Some(unsafe { bytes(&context) }),
            ..TestRunOptions::default()
        };
        let result = self
            .classifier(program)?
            .test_run(options)
            .with_context(|| format!("BPF_PROG_TEST_RUN {program}"))?;
        out.truncate(result.data_size_out as usize);
        Ok(Outcome { verdict: result.return_value, packet: out })
    }

    /// Lets `count` copies of a frame arrive on device `ifindex`, verdicts obeyed. The frames' memory is used again,
    /// with what the program wrote into it.
    pub fn inject_xdp(&self, packet: &[u8], ifindex: u32, count: u32) -> anyhow::Result<()> {
        let context = xdp_context(packet, ifindex);
        let options = TestRunOptions {
            data_in: Some(packet),
            // SAFETY: six words, no padding.
            ctx_in: Some(unsafe { bytes(&context) }),
            repeat: count,
            attrs: TestRunAttrs::new().xdp_live_frames(64),
            ..TestRunOptions::default()
        };
        self.xdp()?.test_run(options).map(drop).context("BPF_PROG_TEST_RUN pc_xdp with live frames")
    }

    fn xdp(&self) -> anyhow::Result<&Xdp> {
        match self.ebpf.program("pc_xdp") {
            Some(Program::Xdp(program)) => Ok(program),
            _ => anyhow::bail!("the kernel object has no XDP program pc_xdp"),
        }
    }

    fn classifier(&self, name: &str) -> anyhow::Result<&SchedClassifier> {
        match self.ebpf.program(name) {
            Some(Program::SchedClassifier(program)) => Ok(program),
            _ => anyhow::bail!("the kernel object has no classifier {name}"),
        }
    }
}

fn xdp_context(packet: &[u8], ifindex: u32) -> XdpContext {
    XdpContext { data_end: packet.len() as u32, ingress_ifindex: ifindex, ..XdpContext::default() }
}

/// The context of a frame received by XDP on this device.
pub(super) fn xdp_bytes(packet: &[u8], ifindex: u32) -> Vec<u8> {
    let context = xdp_context(packet, ifindex);
    // SAFETY: six words, no padding.
    unsafe { bytes(&context) }.to_vec()
}

/// The context of a frame seen by a TC program of this device.
pub(super) fn skb_bytes(ifindex: u32) -> Vec<u8> {
    let context = SkbContext { ifindex, ..SkbContext::default() };
    // SAFETY: eleven words, no padding.
    unsafe { bytes(&context) }.to_vec()
}
