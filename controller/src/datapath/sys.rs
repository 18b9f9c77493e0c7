//! bpf(2), as far as aya 0.14 does not offer it: maps by hand, batches, links by index, pins.
//!
//! Every function here is one system call and returns the kernel's plain answer; the callers add what they were
//! doing to what. Raw links instead of aya's: they are made by interface index (a name can change between look-up and
//! attach) and never fall back to a netlink attachment, which could not be pinned and would die differently.

use std::ffi::CString;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use aya_obj::generated::{bpf_attach_type, bpf_attr, bpf_cmd, bpf_link_info, bpf_map_info, bpf_prog_info};

use crate::privileges::privileged;

/// The one place where this room enters the kernel.
pub(super) fn bpf(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i32> {
    #[cfg(test)]
    super::tests::faults::strike()?;
    enter(cmd, attr)
}

fn enter(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i32> {
    // SAFETY: `attr` is a whole bpf_attr, zeroed where the caller set nothing; what it points to outlives the call,
    // because every caller passes addresses of arguments and locals.
    let answer = unsafe {
        libc::syscall(libc::SYS_bpf, cmd as libc::c_long, &raw mut *attr, mem::size_of::<bpf_attr>())
    };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer as i32) }
}

/// An empty argument.
pub(super) fn zeroed() -> bpf_attr {
    // SAFETY: a union of plain integers; all zeroes is what the kernel takes for "not given".
    unsafe { mem::zeroed() }
}

/// Like [`bpf`], for commands that answer with a new descriptor.
fn bpf_fd(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    let fd = bpf(cmd, attr)?;
    // SAFETY: the kernel just made this descriptor for us (close-on-exec) and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Size, type and flags of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// `BPF_MAP_TYPE_*`.
    pub kind: u32,
    /// Bytes of a key.
    pub key: u32,
    /// Bytes of a value (of one CPU's value in a per-CPU map).
    pub value: u32,
    pub max_entries: u32,
    /// `BPF_F_*`.
    pub flags: u32,
}

/// BPF_MAP_CREATE.
pub(super) fn map_create(name: &str, shape: &Shape) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    // SAFETY: the command reads this member of the union.
    let create = unsafe { &mut attr.__bindgen_anon_1 };
    create.map_type = shape.kind;
    create.key_size = shape.key;
    create.value_size = shape.value;
    create.max_entries = shape.max_entries;
    create.map_flags = shape.flags;
    for (to, from) in create.map_name.iter_mut().take(15).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    bpf_fd(bpf_cmd::BPF_MAP_CREATE, &mut attr)
}

/// An element command: `value` is the address of the value, or of the next key.
///
/// # Safety
/// `key` and `value` are null or point to as many bytes as the command reads or writes for this map.
pub(super) unsafe fn element(
    cmd: bpf_cmd,
    map: BorrowedFd<'_>,
    key: *const u8,
    value: *mut u8,
    flags: u64,
) -> io::Result<()> {
    let mut attr = zeroed();
    // SAFETY: element commands read this member of the union.
    let element = unsafe { &mut attr.__bindgen_anon_2 };
    element.map_fd = map.as_raw_fd() as u32;
    element.key = key as u64;
    element.__bindgen_anon_1.value = value as u64;
    element.flags = flags;
    bpf(cmd, &mut attr).map(drop)
}

/// BPF_OBJ_PIN: the object lives until the path is removed.
pub(super) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let name = c_path(path)?;
    let mut attr = zeroed();
    // SAFETY: the command reads this member of the union.
    let object = unsafe { &mut attr.__bindgen_anon_4 };
    object.pathname = name.as_ptr() as u64;
    object.bpf_fd = fd.as_raw_fd() as u32;
    bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr).map(drop)
}

/// BPF_OBJ_GET: a descriptor for what is pinned at `path`; `None` if nothing is.
pub(super) fn open_pin(path: &Path) -> io::Result<Option<OwnedFd>> {
    let name = c_path(path)?;
    let mut attr = zeroed();
    attr.__bindgen_anon_4.pathname = name.as_ptr() as u64;
    match bpf_fd(bpf_cmd::BPF_OBJ_GET, &mut attr) {
        Ok(fd) => Ok(Some(fd)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// BPF_OBJ_GET_INFO_BY_FD into a kernel structure.
///
/// # Safety
/// `T` is the `bpf_*_info` of the kind of object behind `fd`; all zeroes is a valid `T`.
unsafe fn info<T>(fd: BorrowedFd<'_>) -> io::Result<T> {
    // SAFETY: the caller vouches for zeroes being a valid `T`.
    let mut out: T = unsafe { mem::zeroed() };
    let mut attr = zeroed();
    // SAFETY: the command reads this member of the union; `out` has `info_len` writable bytes.
    let query = unsafe { &mut attr.info };
    query.bpf_fd = fd.as_raw_fd() as u32;
    query.info_len = mem::size_of::<T>() as u32;
    query.info = &raw mut out as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(out)
}

/// Shape and id of a map.
pub(super) fn map_info(fd: BorrowedFd<'_>) -> io::Result<(u32, Shape)> {
    // SAFETY: plain integers; the callers pass map descriptors.
    let info: bpf_map_info = unsafe { info(fd)? };
    let shape = Shape {
        kind: info.type_,
        key: info.key_size,
        value: info.value_size,
        max_entries: info.max_entries,
        flags: info.map_flags,
    };
    Ok((info.id, shape))
}

/// What the kernel says of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkState {
    pub id: u32,
    /// `BPF_LINK_TYPE_*`.
    pub kind: u32,
    pub program: u32,
    /// The device; 0 once it is gone, and for links without a device.
    pub ifindex: u32,
    /// `BPF_TCX_*`; 0 for other kinds.
    pub attach_type: u32,
}

pub(super) const LINK_XDP: u32 = aya_obj::generated::bpf_link_type::BPF_LINK_TYPE_XDP as u32;
pub(super) const LINK_TCX: u32 = aya_obj::generated::bpf_link_type::BPF_LINK_TYPE_TCX as u32;

/// What the kernel says of a link.
pub(super) fn link_info(fd: BorrowedFd<'_>) -> io::Result<LinkState> {
    // SAFETY: plain integers; the callers pass link descriptors.
    let info: bpf_link_info = unsafe { info(fd)? };
    let (ifindex, attach_type) = match info.type_ {
        // SAFETY: the kernel fills the member that belongs to the link's type.
        LINK_XDP => (unsafe { info.__bindgen_anon_1.xdp.ifindex }, 0),
        // SAFETY: as above.
        LINK_TCX => unsafe { (info.__bindgen_anon_1.tcx.ifindex, info.__bindgen_anon_1.tcx.attach_type) },
        _ => (0, 0),
    };
    Ok(LinkState { id: info.id, kind: info.type_, program: info.prog_id, ifindex, attach_type })
}

/// Number and name of a program; the kernel keeps 15 bytes of the name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ProgramName {
    pub id: u32,
    pub name: String,
}

/// What the kernel calls a program.
pub(super) fn program_info(fd: BorrowedFd<'_>) -> io::Result<ProgramName> {
    // SAFETY: plain integers; the callers pass program descriptors.
    let info: bpf_prog_info = unsafe { info(fd)? };
    let name: Vec<u8> = info.name.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
    Ok(ProgramName { id: info.id, name: String::from_utf8_lossy(&name).into_owned() })
}

/// BPF_PROG_GET_FD_BY_ID.
pub(super) fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    by_id(bpf_cmd::BPF_PROG_GET_FD_BY_ID, id)
}

/// BPF_MAP_GET_FD_BY_ID.
pub(super) fn map_by_id(id: u32) -> io::Result<OwnedFd> {
    by_id(bpf_cmd::BPF_MAP_GET_FD_BY_ID, id)
}

/// The one kind of call that wants CAP_SYS_ADMIN, which the daemon has only while it starts.
fn by_id(cmd: bpf_cmd, id: u32) -> io::Result<OwnedFd> {
    #[cfg(test)]
    super::tests::faults::strike()?;
    let fd = privileged(move || {
        let mut attr = zeroed();
        attr.__bindgen_anon_6.__bindgen_anon_1.start_id = id;
        enter(cmd, &mut attr)
    })?;
    // SAFETY: as in `bpf_fd`; descriptors belong to the process, whichever thread asked.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// BPF_LINK_CREATE on a device.
pub(super) fn link_create(
    program: BorrowedFd<'_>,
    ifindex: u32,
    attach_type: bpf_attach_type,
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    // SAFETY: the command reads this member of the union.
    let create = unsafe { &mut attr.link_create };
    create.__bindgen_anon_1.prog_fd = program.as_raw_fd() as u32;
    create.__bindgen_anon_2.target_ifindex = ifindex;
    create.attach_type = attach_type as u32;
    create.flags = flags;
    bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr)
}

/// BPF_LINK_UPDATE: from one packet to the next the link runs another program.
pub(super) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = zeroed();
    // SAFETY: the command reads this member of the union.
    let update = unsafe { &mut attr.link_update };
    update.link_fd = link.as_raw_fd() as u32;
    update.__bindgen_anon_1.new_prog_fd = program.as_raw_fd() as u32;
    bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// BPF_LINK_DETACH: off the device, whoever else holds the link.
pub(super) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = zeroed();
    attr.link_detach.link_fd = link.as_raw_fd() as u32;
    bpf(bpf_cmd::BPF_LINK_DETACH, &mut attr).map(drop)
}

/// BPF_RAW_TRACEPOINT_OPEN; the answer is a link.
pub(super) fn raw_tracepoint(program: BorrowedFd<'_>, name: &str) -> io::Result<OwnedFd> {
    let name = CString::new(name).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut attr = zeroed();
    // SAFETY: the command reads this member of the union.
    let open = unsafe { &mut attr.raw_tracepoint };
    open.name = name.as_ptr() as u64;
    open.prog_fd = program.as_raw_fd() as u32;
    bpf_fd(bpf_cmd::BPF_RAW_TRACEPOINT_OPEN, &mut attr)
}

/// BPF_PROG_QUERY of a tcx hook: the programs in the order they run.
pub(super) fn tcx_programs(ifindex: u32, attach_type: bpf_attach_type) -> io::Result<Vec<u32>> {
    let mut ids = vec![0u32; 64];
    loop {
        let mut attr = zeroed();
        // SAFETY: the command reads this member of the union; `ids` has room for `count` numbers.
        let query = unsafe { &mut attr.query };
        query.__bindgen_anon_1.target_ifindex = ifindex;
        query.attach_type = attach_type as u32;
        query.prog_ids = ids.as_mut_ptr() as u64;
        query.__bindgen_anon_2.count = ids.len() as u32;
        let answer = bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr);
        // SAFETY: the kernel writes the number of programs here, with success and with ENOSPC.
        let count = unsafe { attr.query.__bindgen_anon_2.count } as usize;
        match answer {
            Ok(_) => {
                ids.truncate(count);
                return Ok(ids);
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && count > ids.len() => {
                ids.resize(count, 0);
            }
            // No program was ever attached there.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
    }
}

/// BPF_PROG_TEST_RUN of a program on a frame once; what it returned and how many bytes `out` got.
pub(super) fn test_run(
    program: BorrowedFd<'_>,
    frame: &[u8],
    context: &[u8],
    out: &mut [u8],
) -> io::Result<(u32, usize)> {
    let mut attr = zeroed();
    attr.test.prog_fd = program.as_raw_fd() as u32;
    attr.test.data_in = frame.as_ptr() as u64;
    attr.test.data_size_in = frame.len() as u32;
    attr.test.data_out = out.as_mut_ptr() as u64;
    attr.test.data_size_out = out.len() as u32;
    attr.test.ctx_in = context.as_ptr() as u64;
    attr.test.ctx_size_in = context.len() as u32;
    bpf(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr)?;
    // SAFETY: the kernel has written these members of the union.
    Ok(unsafe { (attr.test.retval, attr.test.data_size_out as usize) })
}
