//! Which kernels there are to test on, and which of Debian's packages holds one; no machine in sight.

use anyhow::{Context as _, bail};

/// A line of kernels that Debian packages.
#[derive(Debug, PartialEq, Eq)]
pub struct Series {
    /// What `--kernel` says, such as "6.1".
    pub name: &'static str,
    /// The suites of Debian's archive that have it, security updates included.
    pub suites: &'static [&'static str],
}

/// Debian 12's own kernel, and the newest that its backports, and security updates, offer.
pub const ALL: [Series; 2] = [
    Series { name: "6.1", suites: &["bookworm", "bookworm-security"] },
    Series { name: "6.12", suites: &["bookworm-backports", "bookworm-security"] },
];

impl Series {
    /// The series with this name.
    ///
    /// # Errors
    /// If there is none; the message says which there are.
    pub fn find(name: &str) -> anyhow::Result<&'static Self> {
        ALL.iter().find(|series| series.name == name).with_context(|| {
            let known: Vec<&str> = ALL.iter().map(|series| series.name).collect();
            format!("there is no --kernel {name}: it can be {}", known.join(" or "))
        })
    }

    /// Major and minor number, to compare.
    pub fn version(&self) -> (u32, u32) {
        match numbers(self.name)[..] {
            [major, minor] => (major, minor),
            _ => unreachable!("the test of ALL"),
        }
    }

    /// The newest of these packages that holds a kernel of this series: the one people run, neither the cloud's nor a
    /// real-time one, signed or not.
    ///
    /// # Errors
    /// If there is none.
    pub fn newest(&self, packages: &str) -> anyhow::Result<String> {
        let of_series = |package: &&str| {
            let version = package.strip_prefix("linux-image-").and_then(|rest| rest.strip_suffix("-amd64"));
            version.is_some_and(|version| {
                let rest = version.strip_prefix(self.name).unwrap_or_default();
                rest.starts_with('.') && !["-cloud", "-rt"].iter().any(|flavour| rest.ends_with(flavour))
            })
        };
        let newest = packages
            .lines()
            .map(str::trim)
            .filter(of_series)
            .max_by_key(|package| numbers(package.trim_end_matches("-amd64")));
        Ok(newest
            .with_context(|| {
                format!("Debian's {} has no kernel {} any more", self.suites.join(", "), self.name)
            })?
            .to_owned())
    }
}

/// The numbers in a text, in order: what two versions of one series differ in.
fn numbers(text: &str) -> Vec<u32> {
    text.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// Where this machine gets Debian's packages from, by what its apt is told (one-line and deb822 style alike): the
/// archive's address, and that of security updates.
///
/// # Errors
/// If it has no Debian archive.
pub fn mirrors(sources: &str) -> anyhow::Result<(String, String)> {
    let words =
        || sources.lines().filter(|line| !line.trim_start().starts_with('#')).flat_map(str::split_whitespace);
    let named = |end: &str| {
        let wanted = |word: &&str| {
            word.contains("://")
                && word.trim_end_matches('/').rsplit('/').next().is_some_and(|last| last == end)
        };
        words().find(wanted).map(|word| word.trim_end_matches('/').to_owned())
    };
    let Some(archive) = named("debian") else {
        bail!("the kernels are Debian's packages, and this machine's apt knows no Debian archive")
    };
    let security = named("debian-security").unwrap_or_else(|| format!("{archive}-security"));
    Ok((archive, security))
}

/// The lines of a sources.list that offers these suites.
pub fn sources_list(suites: &[&str], (archive, security): &(String, String)) -> String {
    let line = |suite: &&str| {
        let address = if suite.ends_with("-security") { security } else { archive };
        format!("deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {address} {suite} main\n")
    };
    suites.iter().map(line).collect()
}

/// The packages that a simulated installation would install.
pub fn simulated(output: &str) -> Vec<String> {
    output
        .lines()
        .filter_map(|line| line.strip_prefix("Inst ")?.split(' ').next().map(str::to_owned))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_is_not_offered_is_refused_with_those_that_are() {
        let error = Series::find("5.10").expect_err("not offered").to_string();
        assert!(error.contains("6.1 or 6.12"), "{error}");
        assert!(Series::find("6.1").is_ok() && Series::find("6.12").is_ok());
        assert!(Series::find("6.12.1").is_err());
    }

    #[test]
    fn every_series_has_a_major_and_a_minor_number() {
        assert_eq!(ALL.map(|series| series.version()), [(6, 1), (6, 12)]);
    }

    #[test]
    fn of_a_series_the_newest_plain_kernel_is_taken() {
        let packages = "\
linux-image-6.1.0-9-amd64
linux-image-6.1.0-56-amd64
linux-image-6.1.0-57-cloud-amd64
linux-image-6.1.0-57-rt-amd64
linux-image-6.1.0-57-amd64-unsigned
linux-image-6.1.0-57-amd64-dbg
linux-image-6.12.90+deb12-amd64
linux-image-6.12.90+deb12.1-amd64
linux-image-6.12.9+deb12-amd64
linux-image-amd64
";
        let newest =
            |name: &str| Series::find(name).and_then(|series| series.newest(packages)).expect("there is one");
        assert_eq!(newest("6.1"), "linux-image-6.1.0-56-amd64");
        assert_eq!(newest("6.12"), "linux-image-6.12.90+deb12.1-amd64");
        let error = ALL[1].newest("linux-image-6.1.0-9-amd64").expect_err("none").to_string();
        assert!(error.contains("has no kernel 6.12"), "{error}");
    }

    #[test]
    fn the_archive_is_found_in_either_style_of_sources_and_nothing_foreign_is_taken_for_it() {
        let deb822 = "Types: deb\n# http://old.example/debian\nURIs: http://mirror.example/debian/\nSuites: bookworm\n\n\
                      URIs: http://mirror.example/debian-security\n";
        let security = "http://mirror.example/debian-security".to_owned();
        assert_eq!(
            mirrors(deb822).expect("found"),
            ("http://mirror.example/debian".to_owned(), security.clone())
        );
        let line = "deb [arch=amd64] https://mirror.example/debian bookworm main\n";
        assert_eq!(mirrors(line).expect("found").1, "https://mirror.example/debian-security");
        assert!(mirrors("deb http://archive.example/ubuntu noble main\n").is_err());
    }

    #[test]
    fn security_updates_have_an_address_of_their_own() {
        let mirrors = ("http://m/debian".to_owned(), "http://m/security".to_owned());
        let list = sources_list(ALL[0].suites, &mirrors);
        let places: Vec<Vec<&str>> = list.lines().map(|line| line.split(' ').skip(2).collect()).collect();
        let expected =
            [["http://m/debian", "bookworm", "main"], ["http://m/security", "bookworm-security", "main"]];
        assert_eq!(places, expected);
    }

    #[test]
    fn what_a_simulation_would_install_is_read_and_what_it_would_remove_is_not() {
        let output = "Reading state...\nRemv qemu-utils [1:10]\nInst seabios (1.16.2-1 Debian:12 [all])\n\
                      Inst libfdt1 [1.5] (1.6.1 Debian:12 [amd64])\nConf seabios (1.16.2-1 Debian:12 [all])\n";
        assert_eq!(simulated(output), ["seabios", "libfdt1"]);
    }
}
