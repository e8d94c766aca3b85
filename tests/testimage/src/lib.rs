//! Packs a static program into an OCI image archive. What the program does is in `main.rs`; nothing is pulled or copied
//! from elsewhere.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The name and tag that the demo and the tests use.
pub const IMAGE: &str = "oarlock.local/testimage:1";

/// The commands that the program answers to, each a link in the image's `/bin`.
pub const APPLETS: &[&str] = &[
    "http", "udp-echo", "tcp-echo", "resolve", "fetch", "sleep", "exit", "signal", "oom", "stress", "log", "echo",
    "cat", "ls", "env", "id", "true", "false", "tar", "tty-size", "write", "hostname",
];

/// An image to pack.
pub struct Image<'a> {
    /// The reference to put on it, with its tag.
    pub reference: &'a str,
    /// The default command line.
    pub entrypoint: &'a [&'a str],
    /// The user in the form of an image configuration, empty for root.
    pub user: &'a str,
    /// Further files: path in the image without a leading slash, contents, mode.
    pub files: &'a [(&'a str, &'a [u8], u32)],
}

impl Default for Image<'_> {
    fn default() -> Self {
        Self { reference: IMAGE, entrypoint: &["/bin/http"], user: "", files: &[] }
    }
}

/// Writes an OCI image layout with one single-layer image of `program` as a tar archive at `archive`, complete or not at
/// all. The same input gives the same bytes.
pub fn pack(program: &Path, image: &Image<'_>, archive: &Path) -> io::Result<()> {
    let layer = layer(&fs::read(program)?, image)?;
    let diff_id = digest(&layer);
    let config = serde_json::to_vec(&json!({
        "architecture": architecture(),
        "os": "linux",
        "config": {
            "Entrypoint": image.entrypoint,
            "Env": ["PATH=/bin"],
            "WorkingDir": "/",
            "User": image.user,
        },
        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
    }))?;
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
    }))?;
    let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    entry["annotations"] = json!({
        "org.opencontainers.image.ref.name": image.reference,
        "io.containerd.image.name": image.reference,
    });
    let index = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry],
    }))?;

    let temporary = archive.with_extension("partial");
    let mut tar = tar::Builder::new(File::create(&temporary)?);
    add(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#, 0o644)?;
    add(&mut tar, "index.json", &index, 0o644)?;
    for blob in [&config, &manifest, &layer] {
        add(&mut tar, &format!("blobs/sha256/{}", hex(blob)), blob, 0o644)?;
    }
    tar.into_inner()?.flush()?;
    fs::rename(&temporary, archive)
}

fn layer(program: &[u8], image: &Image<'_>) -> io::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, mode) in
        [("bin", 0o755), ("etc", 0o755), ("proc", 0o555), ("sys", 0o555), ("dev", 0o755), ("tmp", 0o1777)]
    {
        let mut header = header(tar::EntryType::Directory, mode, 0);
        tar.append_data(&mut header, path, io::empty())?;
    }
    add(&mut tar, "bin/testimage", program, 0o755)?;
    for applet in APPLETS {
        let mut header = header(tar::EntryType::Symlink, 0o777, 0);
        tar.append_link(&mut header, format!("bin/{applet}"), "testimage")?;
    }
    add(
        &mut tar,
        "etc/passwd",
        b"root:x:0:0:root:/:/bin/false\nrower:x:1000:1000:rower:/tmp:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        0o644,
    )?;
    add(&mut tar, "etc/group", b"root:x:0:\ncrew:x:1001:rower\nrower:x:1000:\nnogroup:x:65534:\n", 0o644)?;
    for (path, contents, mode) in image.files {
        add(&mut tar, path, contents, *mode)?;
    }
    tar.into_inner()
}

fn add<W: Write>(tar: &mut tar::Builder<W>, path: &str, contents: &[u8], mode: u32) -> io::Result<()> {
    let mut header = header(tar::EntryType::Regular, mode, contents.len());
    tar.append_data(&mut header, path, contents)
}

fn header(kind: tar::EntryType, mode: u32, size: usize) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size as u64);
    header.set_mtime(0);
    header
}

fn descriptor(media_type: &str, contents: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": digest(contents), "size": contents.len() })
}

fn digest(contents: &[u8]) -> String {
    format!("sha256:{}", hex(contents))
}

fn hex(contents: &[u8]) -> String {
    Sha256::digest(contents).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_twice_gives_the_same_archive() {
        let directory = tempfile::tempdir().expect("tempdir");
        let program = directory.path().join("program");
        fs::write(&program, b"not really a program").expect("write");
        let archives = [directory.path().join("a.tar"), directory.path().join("b.tar")];
        for archive in &archives {
            pack(&program, &Image::default(), archive).expect("pack");
        }
        assert_eq!(fs::read(&archives[0]).expect("read"), fs::read(&archives[1]).expect("read"));
    }
}
