//! The first file system of the virtual machine: busybox, the modules that reach the host's files, and a script.

use std::{fs, path::Path};

use anyhow::{Context as _, ensure};

use super::ground::Ground;

/// What the script needs before the host's files are there.
const MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];

const DIRECTORIES: [&str; 9] = ["bin", "dev", "host", "modules", "new", "proc", "room", "run", "sys"];

/// The whole archive. `script` is what runs in the host's file system.
pub fn build(ground: &Ground, script: &Path) -> anyhow::Result<Vec<u8>> {
    let index = ground.modules.join("modules.dep");
    let index = fs::read_to_string(&index).with_context(|| format!("reading {}", index.display()))?;
    let mut archive = Archive::default();
    for directory in DIRECTORIES {
        archive.add(directory, 0o040_755, &[]);
    }
    let read = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
    archive.add("bin/busybox", 0o100_755, &read(&ground.busybox)?);
    archive.add("bin/sh", 0o120_777, b"busybox");
    let mut names = String::new();
    for module in load_order(&index, &MODULES)? {
        let name = module.rsplit('/').next().unwrap_or(module);
        archive.add(&format!("modules/{name}"), 0o100_644, &read(&ground.modules.join(module))?);
        names += &format!("/modules/{name}\n");
    }
    archive.add("modules/order", 0o100_644, names.as_bytes());
    let script = script.to_str().context("the path of the target directory is not UTF-8")?;
    archive.add("script", 0o100_644, format!("{script}\n").as_bytes());
    archive.add("init", 0o100_755, include_bytes!("init.sh"));
    Ok(archive.finish())
}

/// Files of these modules and of all they need, in the order in which the kernel takes them, by a `modules.dep`. A module
/// that is not in there is part of the kernel.
fn load_order<'a>(index: &'a str, wanted: &[&str]) -> anyhow::Result<Vec<&'a str>> {
    ensure!(!index.is_empty(), "modules.dep is empty");
    let mut order: Vec<&str> = Vec::new();
    for module in wanted {
        let is_it = |file: &str| {
            let name = file.rsplit('/').next().unwrap_or(file);
            name.split_once(".ko").is_some_and(|(name, _)| name == *module)
        };
        let entry = index.lines().filter_map(|line| line.split_once(':')).find(|(file, _)| is_it(file));
        let Some((file, needs)) = entry else { continue };
        // What is needed first stands last.
        for file in needs.split_whitespace().rev().chain([file]) {
            if !order.contains(&file) {
                order.push(file);
            }
        }
    }
    Ok(order)
}

/// A cpio archive as the kernel reads it (Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    count: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.count += 1;
        let fields =
            [self.count, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need_each_once_whether_compressed_or_not() {
        let index = "kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko kernel/fs/netfs.ko\n\
                     kernel/net/9p/9pnet.ko:\nkernel/fs/netfs.ko:\n\
                     kernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko kernel/virtio.ko\n";
        let order = load_order(index, &["9pnet_virtio", "9p", "built_in"]).expect("in order");
        let expected = [
            "kernel/virtio.ko",
            "kernel/net/9p/9pnet.ko",
            "kernel/net/9p/9pnet_virtio.ko.xz",
            "kernel/fs/netfs.ko",
            "kernel/fs/9p/9p.ko",
        ];
        assert_eq!(order, expected);
        assert!(load_order("", &["9p"]).is_err());
    }

    #[test]
    fn headers_and_contents_begin_at_multiples_of_four_and_the_trailer_ends_them() {
        let mut archive = Archive::default();
        archive.add("a", 0o100_644, b"hello");
        let bytes = archive.finish();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[54..62], b"00000005", "size");
        assert_eq!(&bytes[110..117], b"a\0hello");
        assert_eq!(&bytes[120..126], b"070701");
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.windows(11).any(|window| window == b"TRAILER!!!\0"));
    }
}
