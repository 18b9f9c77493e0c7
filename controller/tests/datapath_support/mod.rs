//! A place of its own for every test: a network namespace with veth pairs and a bpf filesystem, in a thread that has
//! both to itself. They go with the thread, killed or not; nothing of the machine's own is touched.

#![allow(dead_code, reason = "shared by several test binaries, of which none uses everything")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Where a test works.
pub struct Place {
    directory: PathBuf,
}

/// Runs `test` in a place of its own; says so and does nothing without root.
pub fn in_a_place_of_its_own(test: impl FnOnce(&Place) + Send) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root for bpf(2) and namespaces");
        return;
    }
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            let place = Place::make();
            // Caught, so that the directory goes even when the test fails.
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(&place)));
            drop(place);
            outcome
        });
        match inside.join() {
            Ok(Ok(())) => {}
            Ok(Err(panic)) | Err(panic) => std::panic::resume_unwind(panic),
        }
    });
}

impl Place {
    fn make() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = PathBuf::from(format!("/run/portcullis-test-{}-{number}", std::process::id()));
        let place = Place { directory };
        fs::create_dir_all(place.bpffs()).expect("the test's directory can be made");
        // This thread's mounts and devices are its own from here on.
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).expect("unshare");
        let nothing = None::<&str>;
        mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)
            .expect("mounts become private");
        mount(Some("bpf"), &place.bpffs(), Some("bpf"), MsFlags::empty(), nothing)
            .expect("a bpffs of our own");
        for scope in ["all", "default"] {
            // Router solicitations would be counted among the test's packets. Absent on a kernel without IPv6.
            let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6"), "1");
        }
        run("ip link set lo up");
        place
    }

    fn bpffs(&self) -> PathBuf {
        self.directory.join("bpf")
    }

    /// Where the datapath of the test has its pins; inside the bpf filesystem, not made yet.
    pub fn pins(&self) -> PathBuf {
        self.bpffs().join("portcullis")
    }

    /// A directory that is in no bpf filesystem.
    pub fn plain_directory(&self) -> &Path {
        &self.directory
    }

    /// A veth pair, both ends up; returns their indices.
    pub fn veth(&self, name: &str, peer: &str) -> (u32, u32) {
        run(&format!("ip link add {name} type veth peer name {peer}"));
        run(&format!("ip link set {name} up"));
        run(&format!("ip link set {peer} up"));
        (ifindex(name), ifindex(peer))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Detached even where something in it is still open: the directory must go.
        let _ = nix::mount::umount2(&self.bpffs(), nix::mount::MntFlags::MNT_DETACH);
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Index of a device of this thread's namespace.
pub fn ifindex(name: &str) -> u32 {
    nix::net::if_::if_nametoindex(name).unwrap_or_else(|errno| panic!("device {name}: {errno}"))
}

/// Runs a command in this thread's namespaces and returns what it said.
pub fn run(line: &str) -> String {
    let mut words = line.split_whitespace();
    let program = words.next().expect("a program");
    let output = Command::new(program).args(words).output().unwrap_or_else(|error| panic!("{line}: {error}"));
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// An Ethernet frame with an IPv4 UDP packet of no flow, 60 bytes.
pub fn frame() -> Vec<u8> {
    let mut frame = vec![0u8; 60];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
    frame[12..14].copy_from_slice(&0x0800u16.to_be_bytes());
    frame[14] = 0x45;
    frame[16..18].copy_from_slice(&46u16.to_be_bytes());
    frame[22] = 64;
    frame[23] = 17;
    frame[26..30].copy_from_slice(&[198, 51, 100, 7]);
    frame[30..34].copy_from_slice(&[203, 0, 113, 99]);
    frame[34..36].copy_from_slice(&4000u16.to_be_bytes());
    frame[36..38].copy_from_slice(&4001u16.to_be_bytes());
    frame[38..40].copy_from_slice(&26u16.to_be_bytes());
    let sum: u32 = (14..34).step_by(2).map(|i| u32::from(u16::from_be_bytes([frame[i], frame[i + 1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    frame[24..26].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    frame
}
