//! What a virtual machine is made of, fetched with apt and unpacked below `target/kernels`: the kernel, QEMU where the
//! machine has none, and a busybox that needs no libraries. Nothing is installed, and the machine's own package lists
//! stay as they are.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};

use super::series::{self, Series};
use crate::setup::{self, CommandLine};

/// For each command; a kernel is 110 MB.
const PATIENCE: Duration = Duration::from_secs(20 * 60);

/// The unpacked things.
#[derive(Debug)]
pub struct Ground {
    /// `target/kernels/SERIES`: what is made for each run lies here too.
    pub directory: PathBuf,
    /// The kernel's release, as `uname -r` will say it.
    pub release: String,
    pub kernel: PathBuf,
    /// `…/lib/modules/RELEASE`.
    pub modules: PathBuf,
    pub busybox: PathBuf,
    pub qemu: Qemu,
}

/// A QEMU, and how it finds what belongs to it.
#[derive(Debug)]
pub struct Qemu {
    pub program: PathBuf,
    /// Where it was unpacked to, if it was.
    pub root: Option<PathBuf>,
}

const QEMU: &str = "qemu-system-x86_64";

impl Ground {
    /// Fetches what is not there yet.
    ///
    /// # Errors
    /// If the machine is none of Debian's, or the archive does not answer or has no such kernel.
    pub fn prepare(kernels: &Path, series: &Series) -> anyhow::Result<Self> {
        ensure!(cfg!(target_arch = "x86_64"), "other kernels can be tested on x86-64 only so far");
        let directory = kernels.join(series.name);
        let root = directory.join("root");
        if !root.exists() {
            let apt = Apt::of(directory.join("apt"), series.suites)?;
            apt.unpack(&[series.newest(&apt.names("linux-image-6")?)?], &root)?;
        }
        // From this machine's own release, whose libraries QEMU uses.
        let release = release_name()?;
        let tools = || Apt::of(kernels.join("apt"), &[&release, &format!("{release}-security")]);
        let busybox = kernels.join("busybox");
        if !busybox.exists() {
            tools()?.unpack(&["busybox-static".to_owned()], &busybox)?;
        }
        let unpacked = kernels.join("qemu");
        let qemu = if setup::on_path(QEMU) {
            Qemu { program: QEMU.into(), root: None }
        } else {
            if !unpacked.exists() {
                let apt = tools()?;
                let packages = apt.with_dependencies("qemu-system-x86").context(
                    "QEMU cannot be had beside what is installed: install qemu-system-x86 yourself",
                )?;
                apt.unpack(&packages, &unpacked)?;
            }
            Qemu { program: unpacked.join("usr/bin").join(QEMU), root: Some(unpacked) }
        };
        let release = only_name(&root.join("lib/modules"))?;
        let ground = Self {
            kernel: root.join("boot").join(format!("vmlinuz-{release}")),
            modules: root.join("lib/modules").join(&release),
            busybox: busybox.join("bin/busybox"),
            directory,
            release,
            qemu,
        };
        ground.index_modules(&root)?;
        Ok(ground)
    }

    /// Which module needs which: Debian makes that index when a kernel is installed.
    fn index_modules(&self, root: &Path) -> anyhow::Result<()> {
        if self.modules.join("modules.alias").exists() {
            return Ok(());
        }
        let status = Command::new(&self.busybox)
            .args(["depmod", "-b"])
            .args([root.as_os_str(), self.release.as_ref()])
            .status()
            .context("busybox depmod")?;
        ensure!(status.success(), "busybox depmod failed ({status})");
        Ok(())
    }
}

/// The one name in a directory.
fn only_name(directory: &Path) -> anyhow::Result<String> {
    let names: Vec<_> = directory
        .read_dir()
        .with_context(|| format!("reading {}", directory.display()))?
        .collect::<Result<_, _>>()?;
    match &names[..] {
        [name] => Ok(name.file_name().to_string_lossy().into_owned()),
        _ => bail!("{} holds {} kernels instead of one: remove it", directory.display(), names.len()),
    }
}

/// apt with lists and a cache of its own, and the machine's keys and package states.
struct Apt {
    directory: PathBuf,
}

impl Apt {
    /// With the lists of these suites, which it gets from the machine's own mirror.
    fn of(directory: PathBuf, suites: &[&str]) -> anyhow::Result<Self> {
        ensure!(
            setup::on_path("apt-get") && setup::on_path("dpkg-deb"),
            "the kernels are Debian's packages: this works on Debian only, or in a container of it"
        );
        let list = series::sources_list(suites, &series::mirrors(&apt_sources())?);
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(part)).context("making room for apt's lists")?;
        }
        fs::write(directory.join("sources.list"), list)?;
        let apt = Self { directory };
        let words = ["apt-get", "-q"].map(str::to_owned).into_iter();
        shown(words.chain(apt.options()).chain(["update".to_owned()]))?;
        Ok(apt)
    }

    fn options(&self) -> Vec<String> {
        let here = self.directory.display();
        [
            format!("Dir::Etc::sourcelist={here}/sources.list"),
            "Dir::Etc::sourceparts=-".to_owned(),
            format!("Dir::State::lists={here}/lists"),
            format!("Dir::Cache={here}/cache"),
            // Its own user may not write here.
            "APT::Sandbox::User=root".to_owned(),
        ]
        .into_iter()
        .flat_map(|option| ["-o".to_owned(), option])
        .collect()
    }

    /// Package names that begin with this.
    fn names(&self, start: &str) -> anyhow::Result<String> {
        self.output("apt-cache", &["pkgnames", start])
    }

    /// The package, and those it needs that the machine does not have.
    fn with_dependencies(&self, package: &str) -> anyhow::Result<Vec<String>> {
        let output = self.output("apt-get", &["install", "-s", "--no-install-recommends", package])?;
        let packages = series::simulated(&output);
        ensure!(!packages.is_empty(), "apt would install nothing for {package}");
        Ok(packages)
    }

    fn output(&self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let output = Command::new(program)
            .args(self.options())
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("cannot run {program}"))?;
        ensure!(output.status.success(), "{program} {} failed ({})", arguments.join(" "), output.status);
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Downloads packages and unpacks them into `to`, which is there only when all of them are.
    fn unpack(&self, packages: &[String], to: &Path) -> anyhow::Result<()> {
        let archives = self.directory.join("archives");
        let partial = to.with_extension("partial");
        for directory in [&archives, &partial] {
            if directory.exists() {
                fs::remove_dir_all(directory).with_context(|| format!("removing {}", directory.display()))?;
            }
            fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
        }
        let place = archives.display().to_string();
        let words = ["env", "-C", &place, "apt-get", "-q"].map(str::to_owned).into_iter();
        shown(words.chain(self.options()).chain(["download".to_owned()]).chain(packages.iter().cloned()))?;
        for archive in archives.read_dir()? {
            let status = Command::new("dpkg-deb").arg("-x").arg(archive?.path()).arg(&partial).status();
            ensure!(
                status.context("cannot run dpkg-deb")?.success(),
                "dpkg-deb cannot unpack what was downloaded"
            );
        }
        fs::remove_dir_all(&archives)?;
        fs::rename(&partial, to).with_context(|| format!("renaming to {}", to.display()))
    }
}

fn shown(words: impl Iterator<Item = String>) -> anyhow::Result<()> {
    let command = CommandLine { environment: Vec::new(), words: words.collect() };
    println!("$ {command}");
    setup::run(&command, PATIENCE)
}

/// All that apt is told about sources.
fn apt_sources() -> String {
    let parts = Path::new("/etc/apt/sources.list.d").read_dir().into_iter().flatten().flatten();
    let files = [PathBuf::from("/etc/apt/sources.list")].into_iter().chain(parts.map(|entry| entry.path()));
    files.filter_map(|file| fs::read_to_string(file).ok()).map(|text| text + "\n").collect()
}

/// This Debian's name, such as "bookworm".
fn release_name() -> anyhow::Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(name.context("/etc/os-release has no VERSION_CODENAME")?.trim_matches('"').to_owned())
}
