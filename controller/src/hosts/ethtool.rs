//! The ETHTOOL ioctl: a driver's name, and its features by the names `ethtool -k` shows under the hood
//! (`rx-vlan-hw-parse`, `rx-lro`). No tool has to be installed for this.

use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

// include/uapi/linux/sockios.h and ethtool.h
const SIOCETHTOOL: libc::c_ulong = 0x8946;
const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETHTOOL_SFEATURES: u32 = 0x3b;
const ETH_SS_FEATURES: u32 = 4;
const ETH_GSTRING_LEN: usize = 32;

/// One feature of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    pub on: bool,
    /// The driver lets it be switched.
    pub changeable: bool,
}

/// The driver's name, as in `ethtool -i`. Error: the device is gone or its driver does not say.
pub(super) fn driver(device: &str) -> Result<String> {
    // struct ethtool_drvinfo: cmd, driver[32], version[32], fw_version[32], bus_info[32], … 196 bytes in all.
    let mut buffer = vec![0u32; 196 / 4];
    buffer[0] = ETHTOOL_GDRVINFO;
    call(device, &mut buffer).with_context(|| format!("cannot ask the driver of `{device}` for its name"))?;
    Ok(text(&bytes(&buffer)[4..36]))
}

/// One feature; `None` when the kernel knows no feature of this name.
pub(super) fn feature(device: &str, name: &str) -> Result<Option<Feature>> {
    let names = names(device)?;
    let Some(bit) = names.iter().position(|known| known == name) else {
        return Ok(None);
    };
    let blocks = names.len().div_ceil(32);
    // struct ethtool_gfeatures: cmd, size, then per 32 features: available, requested, active, never_changed.
    let mut buffer = vec![0u32; 2 + 4 * blocks];
    buffer[0] = ETHTOOL_GFEATURES;
    buffer[1] = blocks as u32;
    call(device, &mut buffer).with_context(|| format!("cannot read the offloads of `{device}`"))?;
    let block = &buffer[2 + 4 * (bit / 32)..][..4];
    let mask = 1 << (bit % 32);
    Ok(Some(Feature { on: block[2] & mask != 0, changeable: block[0] & mask != 0 && block[3] & mask == 0 }))
}

/// Switches one feature. Error: unknown feature, or the driver left it as it was.
pub(super) fn set_feature(device: &str, name: &str, on: bool) -> Result<()> {
    let names = names(device)?;
    let Some(bit) = names.iter().position(|known| known == name) else {
        bail!("this kernel knows no offload `{name}`");
    };
    let blocks = names.len().div_ceil(32);
    // struct ethtool_sfeatures: cmd, size, then per 32 features: valid, requested.
    let mut buffer = vec![0u32; 2 + 2 * blocks];
    buffer[0] = ETHTOOL_SFEATURES;
    buffer[1] = blocks as u32;
    let mask = 1 << (bit % 32);
    buffer[2 + 2 * (bit / 32)] = mask;
    buffer[2 + 2 * (bit / 32) + 1] = if on { mask } else { 0 };
    call(device, &mut buffer)
        .with_context(|| format!("cannot turn {name} {} on `{device}`", if on { "on" } else { "off" }))?;
    // The ioctl answers success with flags (ETHTOOL_F_WISH) when the driver wished otherwise: look.
    if feature(device, name)?.is_some_and(|now| now.on != on) {
        bail!("the driver of `{device}` keeps {name} {}", if on { "off" } else { "on" });
    }
    Ok(())
}

/// Names of all features, by bit.
fn names(device: &str) -> Result<Vec<String>> {
    let context = || format!("cannot read the names of the offloads of `{device}`");
    // struct ethtool_sset_info: cmd, reserved, u64 sset_mask, u32 data[1].
    let mut buffer = vec![0u32; 5];
    buffer[0] = ETHTOOL_GSSET_INFO;
    let mask = (1u64 << ETH_SS_FEATURES).to_ne_bytes();
    buffer[2] = u32::from_ne_bytes([mask[0], mask[1], mask[2], mask[3]]);
    buffer[3] = u32::from_ne_bytes([mask[4], mask[5], mask[6], mask[7]]);
    call(device, &mut buffer).with_context(context)?;
    let count = buffer[4] as usize;
    if count > 4096 {
        bail!("the kernel claims {count} offloads for `{device}`, which cannot be");
    }
    // struct ethtool_gstrings: cmd, string_set, len, then 32 bytes per name.
    let mut buffer = vec![0u32; 3 + count * ETH_GSTRING_LEN / 4];
    buffer[0] = ETHTOOL_GSTRINGS;
    buffer[1] = ETH_SS_FEATURES;
    buffer[2] = count as u32;
    call(device, &mut buffer).with_context(context)?;
    Ok(bytes(&buffer)[12..].chunks_exact(ETH_GSTRING_LEN).map(text).collect())
}

/// `struct ifreq` as SIOCETHTOOL reads it.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    data: *mut u32,
    rest: [u8; 16],
}

/// The kernel copies `struct ifreq` whole; ours must be no shorter.
const _: () = assert!(size_of::<Request>() >= size_of::<libc::ifreq>());

fn call(device: &str, buffer: &mut [u32]) -> io::Result<()> {
    if device.len() >= libc::IFNAMSIZ {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut request = Request { name: [0; libc::IFNAMSIZ], data: buffer.as_mut_ptr(), rest: [0; 16] };
    request.name[..device.len()].copy_from_slice(device.as_bytes());
    // SAFETY: `request` is at least a `struct ifreq` (asserted above) with a NUL-terminated name; its data points
    // at `buffer`, which outlives the call, and every caller sizes it for the structure its command fills.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
