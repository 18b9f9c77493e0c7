//! The virtual machine: QEMU with the host's files to read, a console that goes to a file and a serial line to us.

use std::{
    ffi::OsString,
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail};

use super::ground::Ground;

const MEMORY: &str = "3072";

/// Without a sign of life: the slowest test says nothing for some minutes where the processor is emulated.
const SILENCE: Duration = Duration::from_secs(20 * 60);

/// Lines of the console that are shown when it ended by itself.
const CONSOLE_LINES: usize = 25;

/// A machine that runs; it ends with this.
pub struct Machine {
    child: Child,
    output: Receiver<Vec<u8>>,
    console: PathBuf,
}

impl Machine {
    /// Boots it.
    pub fn start(ground: &Ground, initramfs: &Path) -> anyhow::Result<Self> {
        let console = ground.directory.join("console.log");
        let mut command = command(ground, initramfs, &console, hardware());
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", ground.qemu.program.display()))?;
        let mut stdout = child.stdout.take().context("QEMU's output")?;
        let (sender, output) = mpsc::channel();
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(read @ 1..) = stdout.read(&mut chunk) {
                if sender.send(chunk.get(..read).unwrap_or_default().to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, output, console })
    }

    /// The next piece of its output; `None` once it has ended.
    ///
    /// # Errors
    /// If it says nothing for too long.
    pub fn read(&mut self) -> anyhow::Result<Option<Vec<u8>>> {
        match self.output.recv_timeout(SILENCE) {
            Ok(piece) => Ok(Some(piece)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                bail!(
                    "the virtual machine said nothing for {} min\n{}",
                    SILENCE.as_secs() / 60,
                    self.last_words()
                )
            }
        }
    }

    /// The end of its console.
    pub fn last_words(&self) -> String {
        let console = fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&console);
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(CONSOLE_LINES)..).unwrap_or_default();
        format!("its console ({}) ended with:\n{}", self.console.display(), tail.join("\n"))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // One that has ended by itself is only collected.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether this processor runs a stock kernel in a virtual machine by itself and lets us ask it to.
fn hardware() -> bool {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = flags
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"));
    has && fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
}

fn command(ground: &Ground, initramfs: &Path, console: &Path, hardware: bool) -> Command {
    // QEMU ends when we do, however that happens.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(&ground.qemu.program);
    if let Some(root) = &ground.qemu.root {
        let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|part| root.join(part));
        let libraries = std::env::join_paths(libraries).unwrap_or_default();
        command.env("LD_LIBRARY_PATH", libraries);
        command.env("QEMU_MODULE_DIR", root.join("usr/lib/x86_64-linux-gnu/qemu"));
        for part in ["usr/share/seabios", "usr/share/qemu"] {
            command.arg("-L").arg(root.join(part));
        }
    }
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-machine", "q35"]);
    if hardware {
        command.args(["-accel", "kvm", "-cpu", "host"]);
    } else {
        command.args(["-accel", "tcg,thread=multi", "-cpu", "max"]);
    }
    command.args(["-smp", "2", "-m", MEMORY, "-kernel"]).arg(&ground.kernel).arg("-initrd").arg(initramfs);
    // Without mitigations, which cost an emulated processor much and change no program of root's.
    command.args(["-append", "console=ttyS0 panic=-1 mitigations=off"]);
    command.args(["-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"]);
    command.args(["-device", "virtio-9p-pci,fsdev=host,mount_tag=host"]);
    let mut file = OsString::from("file:");
    file.push(console);
    command.arg("-serial").arg(file).args(["-serial", "stdio"]);
    command
}

#[cfg(test)]
mod tests {
    use super::super::ground::Qemu;
    use super::*;

    fn words(root: Option<&str>, hardware: bool) -> (Vec<String>, bool) {
        let ground = Ground {
            directory: "/t/6.1".into(),
            release: "6.1.0".into(),
            kernel: "/t/vmlinuz".into(),
            modules: "/t/modules".into(),
            busybox: "/t/busybox".into(),
            qemu: Qemu { program: "qemu".into(), root: root.map(Into::into) },
        };
        let command = command(&ground, Path::new("/t/initramfs"), Path::new("/t/console"), hardware);
        let words = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
        (words, command.get_envs().any(|(name, _)| name == "LD_LIBRARY_PATH"))
    }

    #[test]
    fn the_hosts_files_are_given_read_only() {
        let (words, _) = words(None, true);
        assert!(
            words.iter().any(|word| word.starts_with("local,") && word.contains(",readonly=on,")),
            "{words:?}"
        );
    }

    #[test]
    fn a_processor_that_cannot_do_it_is_emulated() {
        assert!(words(None, false).0.join(" ").contains("-accel tcg,thread=multi -cpu max"));
        assert!(words(None, true).0.join(" ").contains("-accel kvm -cpu host"));
    }

    #[test]
    fn an_unpacked_qemu_finds_its_libraries_and_firmware_and_an_installed_one_is_left_alone() {
        let (unpacked, libraries) = words(Some("/t/qemu"), false);
        assert!(libraries && unpacked.contains(&"/t/qemu/usr/share/seabios".to_owned()), "{unpacked:?}");
        let (installed, libraries) = words(None, false);
        assert!(!libraries && !installed.contains(&"-L".to_owned()), "{installed:?}");
    }
}
