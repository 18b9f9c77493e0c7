//! Has the policy file changed?

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// What tells one content of a file from the next without reading it.
///
/// Asked for every half second and not watched by inotify: editors replace files, configuration management swaps
/// symbolic links, and a watch on an inode misses both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// The file's stamp now; `None` while there is no file.
    pub fn of(path: &Path) -> Option<Self> {
        let found = fs::metadata(path).ok()?;
        Some(Self {
            device: found.dev(),
            inode: found.ino(),
            size: found.size(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }
}

/// Tells when a file is to be read again: it is not as it was when it was read last, and has stood still for one look.
#[derive(Debug)]
pub struct Watched {
    read: Option<Stamp>,
    seen: Option<Stamp>,
}

impl Watched {
    /// From a file that was read with this stamp.
    pub fn new(read: Option<Stamp>) -> Self {
        Self { read, seen: read }
    }

    /// Looks. A file that is gone is no news: the policy in force stays, and an editor may be about to replace it.
    pub fn look(&mut self, now: Option<Stamp>) -> bool {
        let still = now == self.seen;
        self.seen = now;
        if now.is_none() || now == self.read || !still {
            return false;
        }
        self.read = now;
        true
    }
}

/// The same for the service tag file of the policy in force, which is another one when the policy says so.
#[derive(Debug, Default)]
pub struct TagFile {
    watched: Option<(PathBuf, Watched)>,
}

impl TagFile {
    /// Looks at the file that the policy in force names.
    pub fn look(&mut self, path: Option<&Path>) -> bool {
        let Some(path) = path else {
            self.watched = None;
            return false;
        };
        match &mut self.watched {
            Some((known, watched)) if known == path => watched.look(Stamp::of(path)),
            _ => {
                self.watched = Some((path.to_owned(), Watched::new(Stamp::of(path))));
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(size: u64) -> Option<Stamp> {
        Some(Stamp { device: 1, inode: 2, size, modified: (0, 0), changed: (0, 0) })
    }

    #[test]
    fn a_change_is_reported_once_and_only_after_the_file_stood_still() {
        let mut watched = Watched::new(stamp(1));
        assert!(!watched.look(stamp(1)));
        assert!(!watched.look(stamp(2)), "it may still be being written");
        assert!(!watched.look(stamp(3)));
        assert!(watched.look(stamp(3)));
        assert!(!watched.look(stamp(3)));
    }

    #[test]
    fn a_tag_file_is_news_when_it_changes_and_not_when_the_policy_names_another() {
        let folder = std::env::temp_dir().join(format!("portcullis-tags-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (one, other) = (folder.join("one"), folder.join("other"));
        fs::write(&one, "1").unwrap();
        fs::write(&other, "1").unwrap();
        let mut tags = TagFile::default();
        assert!(!tags.look(None));
        assert!(!tags.look(Some(&one)), "it has just been read");
        fs::write(&one, "12").unwrap();
        assert!(!tags.look(Some(&one)), "it may still be being written");
        assert!(tags.look(Some(&one)));
        assert!(!tags.look(Some(&one)));
        assert!(!tags.look(Some(&other)), "another one");
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_file_that_goes_and_comes_back_the_same_is_no_news() {
        let mut watched = Watched::new(stamp(1));
        assert!(!watched.look(None));
        assert!(!watched.look(None));
        assert!(!watched.look(stamp(1)));
        assert!(!watched.look(stamp(1)));
    }
}
