//! Makes image archives, good and hostile, byte by byte, and a registry on loopback that serves one.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// One entry of a tar archive.
pub struct Entry<'a> {
    pub path: &'a str,
    pub kind: u8,
    pub link: &'a str,
    pub mode: u32,
    pub owner: (u32, u32),
    pub content: &'a [u8],
}

pub fn file<'a>(path: &'a str, content: &'a [u8]) -> Entry<'a> {
    Entry { path, kind: b'0', link: "", mode: 0o644, owner: (0, 0), content }
}

pub fn dir(path: &str) -> Entry<'_> {
    Entry { mode: 0o755, kind: b'5', ..file(path, b"") }
}

pub fn symlink<'a>(path: &'a str, link: &'a str) -> Entry<'a> {
    Entry { kind: b'2', link, ..file(path, b"") }
}

pub fn hard_link<'a>(path: &'a str, link: &'a str) -> Entry<'a> {
    Entry { kind: b'1', link, ..file(path, b"") }
}

/// A PAX header for the entry that follows.
pub fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (key, value) in records {
        let payload = key.len() + value.len() + 3;
        let mut length = payload + 1;
        while payload + length.to_string().len() != length {
            length += 1;
        }
        body.extend_from_slice(format!("{length} {key}=").as_bytes());
        body.extend_from_slice(value);
        body.push(b'\n');
    }
    body
}

/// Bytes that do not get fewer by compression.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    })
    .take(length)
    .collect()
}

pub fn tar(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        let mut header = [0u8; 512];
        let put = |header: &mut [u8; 512], at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
        put(&mut header, 0, &entry.path.as_bytes()[..entry.path.len().min(100)]);
        put(&mut header, 100, format!("{:07o}\0", entry.mode).as_bytes());
        put(&mut header, 108, format!("{:07o}\0", entry.owner.0).as_bytes());
        put(&mut header, 116, format!("{:07o}\0", entry.owner.1).as_bytes());
        put(&mut header, 124, format!("{:011o}\0", entry.content.len()).as_bytes());
        put(&mut header, 136, b"00000000000\0");
        put(&mut header, 148, b"        ");
        header[156] = entry.kind;
        put(&mut header, 157, &entry.link.as_bytes()[..entry.link.len().min(100)]);
        put(&mut header, 257, b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        put(&mut header, 148, format!("{sum:06o}\0 ").as_bytes());
        out.extend_from_slice(&header);
        out.extend_from_slice(entry.content);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

pub fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", String::from_utf8(filter("sha256sum", &[], bytes)).unwrap().split(' ').next().unwrap())
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    filter("gzip", &["-nc"], bytes)
}

fn filter(program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("coreutils and gzip are there");
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    output.stdout
}

/// An image as blobs by digest.
pub struct Built {
    pub blobs: BTreeMap<String, Vec<u8>>,
    pub index_digest: String,
    pub config_digest: String,
    pub layer_digests: Vec<String>,
}

/// Makes an image of layers (uncompressed tars), each stored gzipped; the index has another architecture's entry first.
pub fn build(layers: &[Vec<u8>]) -> Built {
    build_as(layers, "application/vnd.oci.image.layer.v1.tar+gzip", gzip)
}

/// The same with layers as they are.
pub fn build_uncompressed(layers: &[Vec<u8>]) -> Built {
    build_as(layers, "application/vnd.oci.image.layer.v1.tar", <[u8]>::to_vec)
}

fn build_as(layers: &[Vec<u8>], kind: &str, pack: fn(&[u8]) -> Vec<u8>) -> Built {
    let mut blobs = BTreeMap::new();
    let mut add = |bytes: Vec<u8>| {
        let digest = sha256(&bytes);
        blobs.insert(digest.clone(), bytes);
        digest
    };
    let architecture = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
    let diff_ids: Vec<String> = layers.iter().map(|layer| sha256(layer)).collect();
    let packed: Vec<Vec<u8>> = layers.iter().map(|layer| pack(layer)).collect();
    let sizes: Vec<usize> = packed.iter().map(Vec::len).collect();
    let layer_digests: Vec<String> = packed.into_iter().map(&mut add).collect();
    let config = json!({"architecture": architecture, "os": "linux", "config": {"Cmd": ["/bin/true"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids}});
    let config = serde_json::to_vec(&config).unwrap();
    let config_size = config.len();
    let config_digest = add(config);
    let descriptors: Vec<Value> = layer_digests
        .iter()
        .zip(&sizes)
        .map(|(digest, size)| json!({"mediaType": kind, "digest": digest, "size": size}))
        .collect();
    let manifest = serde_json::to_vec(&json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest, "size": config_size},
        "layers": descriptors}))
    .unwrap();
    let manifest_size = manifest.len();
    let manifest_digest = add(manifest);
    let entry = |digest: &str, architecture: &str| {
        json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": manifest_size,
               "platform": {"os": "linux", "architecture": architecture}})
    };
    let other = format!("sha256:{}", "0".repeat(64));
    let index = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry(&other, "s390x"), entry(&manifest_digest, architecture)]});
    let index_digest = add(serde_json::to_vec(&index).unwrap());
    Built { blobs, index_digest, config_digest, layer_digests }
}

/// Writes the image as an OCI layout directory under the given name.
pub fn write_layout(built: &Built, name: &str, at: &Path) {
    fs::create_dir_all(at.join("blobs/sha256")).unwrap();
    for (digest, bytes) in &built.blobs {
        fs::write(at.join("blobs/sha256").join(digest.trim_start_matches("sha256:")), bytes).unwrap();
    }
    fs::write(at.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let size = built.blobs[&built.index_digest].len();
    let index = json!({"schemaVersion": 2, "manifests": [{"mediaType": "application/vnd.oci.image.index.v1+json",
        "digest": built.index_digest, "size": size, "annotations": {"io.containerd.image.name": name}}]});
    fs::write(at.join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
}

/// Writes one layer as a `docker save` archive.
pub fn docker_archive(layer: &[u8], name: &str, dir: &Path) -> PathBuf {
    let config = serde_json::to_vec(&json!({"architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [sha256(layer)]}}))
    .unwrap();
    let manifest =
        serde_json::to_vec(&json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}])).unwrap();
    let archive = tar(&[file("manifest.json", &manifest), file("config.json", &config), file("layer.tar", layer)]);
    let path = dir.join("archive.tar");
    fs::write(&path, archive).unwrap();
    path
}

/// A registry with one repository, on loopback.
pub struct Registry {
    pub address: String,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    blobs: Mutex<BTreeMap<String, Vec<u8>>>,
    tags: Mutex<BTreeMap<String, String>>,
    requests: Mutex<Vec<String>>,
    /// Paths whose next answer breaks off in the middle.
    broken: Mutex<Vec<String>>,
    /// Paths whose next answer stops in the middle and is never finished.
    stalled: Mutex<Vec<String>>,
    /// Parts of blobs can be asked for.
    ranges: AtomicBool,
    /// Bytes of blobs sent.
    sent: AtomicUsize,
    protection: Mutex<Protection>,
}

/// What a caller has to show.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum Protection {
    #[default]
    None,
    /// `user:password` in base64.
    Basic(String),
    /// The same, for a token of the registry's own.
    Token(String),
    /// An identity token, for a token of the registry's own.
    Identity(String),
}

const TOKEN: &str = "a-token";

impl Registry {
    pub async fn start(built: &Built) -> Registry {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = Arc::new(State::default());
        *state.blobs.lock().unwrap() = built.blobs.clone();
        state.tags.lock().unwrap().insert("v1".into(), built.index_digest.clone());
        let serving = state.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream, serving.clone()));
            }
        });
        Registry { address, state }
    }

    pub fn replace_blob(&self, digest: &str, bytes: &[u8]) {
        self.state.blobs.lock().unwrap().insert(digest.into(), bytes.to_vec());
    }

    pub fn break_once(&self, digest: &str) {
        self.state.broken.lock().unwrap().push(digest.into());
    }

    pub fn stall_once(&self, digest: &str) {
        self.state.stalled.lock().unwrap().push(digest.into());
    }

    pub fn serve_ranges(&self) {
        self.state.ranges.store(true, Ordering::Relaxed);
    }

    pub fn protect(&self, protection: Protection) {
        *self.state.protection.lock().unwrap() = protection;
    }

    pub fn bytes_sent(&self) -> usize {
        self.state.sent.load(Ordering::Relaxed)
    }

    /// The paths that were asked for, with their queries.
    pub fn requests(&self) -> Vec<String> {
        self.state.requests.lock().unwrap().clone()
    }

    pub fn requests_for(&self, digest: &str) -> usize {
        self.state.requests.lock().unwrap().iter().filter(|path| path.contains(digest)).count()
    }
}

async fn answer(mut stream: TcpStream, state: Arc<State>) {
    let mut head = Vec::new();
    let mut buffer = [0; 4096];
    while !head.windows(4).any(|window| window == b"\r\n\r\n") {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => head.extend_from_slice(&buffer[..count]),
        }
    }
    let received = head;
    let head = String::from_utf8_lossy(&received).into_owned();
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let header = |name: &str| {
        let line = head.lines().find(|line| line.to_ascii_lowercase().starts_with(&format!("{name}:")));
        line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
    };
    // What is posted is short.
    let posted: usize = header("content-length").parse().unwrap_or(0);
    let mut body = vec![0; posted];
    let there = received.len() - received.windows(4).position(|window| window == b"\r\n\r\n").unwrap() - 4;
    body[..there].copy_from_slice(&received[received.len() - there..]);
    stream.read_exact(&mut body[there..]).await.unwrap();
    let shown = match header("authorization") {
        none if none.is_empty() => String::from_utf8_lossy(&body).into_owned(),
        shown => shown,
    };
    if let Some(answer) = refusal(&state, &path, &shown, &header("host")) {
        let _ = stream.write_all(answer.as_bytes()).await;
        let _ = stream.shutdown().await;
        return;
    }
    state.requests.lock().unwrap().push(path.clone());
    let name = path.split('?').next().unwrap_or_default().rsplit('/').next().unwrap_or_default().to_owned();
    let digest = state.tags.lock().unwrap().get(&name).cloned().unwrap_or(name);
    let found = state.blobs.lock().unwrap().get(&digest).cloned();
    let take = |list: &Mutex<Vec<String>>| {
        let mut list = list.lock().unwrap();
        let at = list.iter().position(|wanted| *wanted == digest);
        at.map(|at| list.remove(at)).is_some()
    };
    let (broken, stalled) = (take(&state.broken), take(&state.stalled));
    let kind = if path.contains("/manifests/") {
        let index = found.as_deref().is_some_and(|bytes| String::from_utf8_lossy(bytes).contains("\"manifests\""));
        if index { "application/vnd.oci.image.index.v1+json" } else { "application/vnd.oci.image.manifest.v1+json" }
    } else {
        "application/octet-stream"
    };
    let (status, body) = match (path.trim_end_matches('/'), found) {
        ("/v2", _) => ("200 OK", b"{}".to_vec()),
        (_, Some(body)) => ("200 OK", body),
        _ => ("404 Not Found", br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#.to_vec()),
    };
    let wanted = header("range");
    let wanted = wanted.strip_prefix("bytes=").filter(|_| state.ranges.load(Ordering::Relaxed));
    let (first, last) = wanted.and_then(|range| range.split_once('-')).unwrap_or_default();
    let (status, body) = match (first.parse::<usize>(), last.parse::<usize>()) {
        (Ok(first), last) if status == "200 OK" => {
            let end = last.map_or(body.len(), |last| (last + 1).min(body.len()));
            ("206 Partial Content", body[first.min(end)..end].to_vec())
        }
        _ => (status, body),
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\ndocker-content-digest: {digest}\r\nconnection: close\r\n\r\n"
    );
    let body = if broken || stalled { &body[..length / 2] } else { &body[..] };
    if path.contains("/blobs/") {
        state.sent.fetch_add(body.len(), Ordering::Relaxed);
    }
    let _ = stream.write_all(head.as_bytes()).await;
    let _ = stream.write_all(body).await;
    if stalled {
        // Until the caller goes.
        let _ = stream.read(&mut buffer).await;
    }
    let _ = stream.shutdown().await;
}

/// The answer to a caller without the right papers, and the tokens for one with them.
fn refusal(state: &State, path: &str, shown: &str, host: &str) -> Option<String> {
    let answer = |status: &str, head: &str, body: &str| {
        let length = body.len();
        Some(format!("HTTP/1.1 {status}\r\n{head}content-length: {length}\r\nconnection: close\r\n\r\n{body}"))
    };
    match state.protection.lock().unwrap().clone() {
        Protection::Basic(known) if shown != format!("Basic {known}") => {
            answer("401 Unauthorized", "www-authenticate: Basic realm=\"here\"\r\n", "{}")
        }
        Protection::Token(known) if path.starts_with("/token") => match shown == format!("Basic {known}") {
            true => answer("200 OK", "content-type: application/json\r\n", &format!("{{\"token\":\"{TOKEN}\"}}")),
            false => answer("401 Unauthorized", "", "{}"),
        },
        Protection::Identity(known) if path.starts_with("/token") => {
            let fields: Vec<&str> = shown.split('&').collect();
            let refresh = format!("refresh_token={known}");
            let all = ["grant_type=refresh_token", &refresh, "service=here", "scope=repository%3Atest%2Fapp%3Apull"];
            match all.iter().all(|field| fields.contains(field)) {
                true => answer("200 OK", "", &format!("{{\"access_token\":\"{TOKEN}\"}}")),
                false => answer("401 Unauthorized", "", "{}"),
            }
        }
        Protection::Token(_) | Protection::Identity(_) if shown != format!("Bearer {TOKEN}") => {
            let challenge = format!("www-authenticate: Bearer realm=\"http://{host}/token\",service=\"here\"\r\n");
            answer("401 Unauthorized", &challenge, "{}")
        }
        _ => None,
    }
}
