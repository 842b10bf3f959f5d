//! Compiled kernels on disk: compiling them all takes some ten seconds of a core, and a worker that is started again
//! should serve at once.
//!
//! What cannot be read or written is compiled again; the cache never fails anything.

use std::hash::Hasher;
use std::path::{Path, PathBuf};

/// Images by what they were made of.
#[derive(Debug, Clone)]
pub struct ImageCache {
    folder: PathBuf,
}

/// What an image is made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Key<'a> {
    pub(super) name: &'static str,
    pub(super) text: &'a str,
    pub(super) arch: &'a str,
    pub(super) compiler: (i32, i32),
}

impl Key<'_> {
    fn file_name(self) -> String {
        let Self { name, text, arch, compiler: (major, minor) } = self;
        let mut hash = Fnv::default();
        hash.write(text.as_bytes());
        format!("{name}-{arch}-{major}.{minor}-{:016x}.cubin", hash.finish())
    }
}

/// FNV-1a: the same on every machine and in every version of this program.
pub(super) struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

impl ImageCache {
    /// In this folder, which is made when something is put there. Whoever can write there decides what runs on the
    /// GPU: it should belong to the user of this process alone.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// The image, if it is there.
    pub(super) fn get(&self, key: Key<'_>) -> Option<Vec<u8>> {
        let image = std::fs::read(self.folder.join(key.file_name())).ok()?;
        (!image.is_empty()).then_some(image)
    }

    /// Keeps an image. Readers see it whole or not at all.
    pub(super) fn put(&self, key: Key<'_>, image: &[u8]) {
        let name = key.file_name();
        let unfinished = self.folder.join(format!("{name}.{}", std::process::id()));
        let written = std::fs::create_dir_all(&self.folder)
            .and_then(|()| std::fs::write(&unfinished, image))
            .and_then(|()| std::fs::rename(&unfinished, self.folder.join(name)));
        if written.is_err() {
            let _never_there = std::fs::remove_file(&unfinished);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_is_found_for_what_it_was_made_of_and_nothing_else() {
        let folder = std::env::temp_dir().join(format!("herd-images-{}", std::process::id()));
        let cache = ImageCache::new(&folder);
        let key = Key { name: "gate", text: "one", arch: "sm_90a", compiler: (13, 0) };
        assert_eq!(cache.get(key), None);
        cache.put(key, b"image");
        cache.put(key, b"newer image");
        assert_eq!(cache.get(key).as_deref(), Some(&b"newer image"[..]));
        for other in [
            Key { name: "embed", ..key },
            Key { text: "two", ..key },
            Key { arch: "sm_80", ..key },
            Key { compiler: (13, 1), ..key },
        ] {
            assert_eq!(cache.get(other), None, "{other:?}");
        }
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "nothing unfinished is left");
        std::fs::remove_dir_all(&folder).unwrap();
        // A folder that cannot be made is no error.
        ImageCache::new(Path::new("/proc/none")).put(key, b"image");
    }
}
