//! The image store: pulls from a registry on loopback, imports, and archives that mean harm. Needs root (owners, whiteouts).

#[allow(dead_code, reason = "shared with the tests of other files, which use the rest")]
mod image_files;

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use image_files::{
    Built, Entry, Registry, build, dir, docker_archive, file, hard_link, pax, symlink, tar, write_layout,
};
use oarlock_images::{Image, ImageError, ImageStore, Pruned, RegistryConfig, Thresholds};
use oarlock_testkit::require_root;

async fn store(dir: &Path) -> ImageStore {
    require_root();
    ImageStore::open(&dir.join("store"), RegistryConfig::default()).await.unwrap()
}

async fn import_layer(layer: &[u8]) -> (tempfile::TempDir, Result<PathBuf, ImageError>) {
    let temp = tempfile::tempdir().unwrap();
    let store = store(temp.path()).await;
    let archive = docker_archive(layer, "test/hostile:1", temp.path());
    let imported = match store.import(&archive).await {
        Ok(images) => {
            let rootfs = store.prepare_rootfs(&images[0].id, "c").await.unwrap();
            Ok(rootfs.lower[0].clone())
        }
        Err(error) => {
            assert!(store.list().is_empty());
            assert_eq!(fs::read_dir(temp.path().join("store/layers")).unwrap().count(), 0);
            assert_eq!(fs::read_dir(temp.path().join("store/scratch")).unwrap().count(), 0);
            Err(error)
        }
    };
    (temp, imported)
}

fn simple() -> Built {
    build(&[tar(&[dir("etc"), file("etc/a", b"lower")]), tar(&[file("etc/b", b"upper"), file("etc/.wh.a", b"")])])
}

fn only(images: Vec<Image>) -> Image {
    assert_eq!(images.len(), 1);
    images.into_iter().next().unwrap()
}

#[tokio::test]
async fn entries_that_would_leave_the_layer_do_not() {
    let temp = tempfile::tempdir().unwrap();
    let victim = temp.path().join("victim");
    fs::create_dir(&victim).unwrap();
    fs::write(victim.join("file"), "untouched").unwrap();
    let victim_path = victim.to_string_lossy().into_owned();
    let inner = format!("{victim_path}/file");
    let through = "link/file";
    let cases: Vec<(&str, Vec<Entry<'_>>)> = vec![
        ("climbing path", vec![file("../../../../../../../../tmp/oarlock-escape", b"x")]),
        ("climbing in the middle", vec![dir("a"), file("a/../../../escape", b"x")]),
        ("absolute link, then through it", vec![symlink("link", &victim_path), file(through, b"overwritten")]),
        (
            "climbing link, then through it",
            vec![symlink("link", "../../../../../../.."), file("link/tmp/oarlock-escape", b"x")],
        ),
        ("link to itself", vec![symlink("loop", "loop"), file("loop/x", b"x")]),
        ("hard link outside", vec![hard_link("stolen", &inner)]),
        ("hard link through a link", vec![symlink("link", &victim_path), hard_link("stolen", "link/file")]),
        ("hard link to nothing", vec![hard_link("a", "b")]),
        ("hard link to a directory", vec![dir("d"), hard_link("a", "d")]),
        ("parent is a file", vec![file("a", b""), file("a/b", b"")]),
        ("file for the root", vec![file("/", b"x")]),
        ("whiteout of a parent", vec![file(".wh...", b"")]),
    ];
    for (what, entries) in cases {
        let (home, result) = import_layer(&tar(&entries)).await;
        assert!(!Path::new("/tmp/oarlock-escape").exists(), "{what}");
        assert_eq!(fs::read_to_string(victim.join("file")).unwrap(), "untouched", "{what}");
        assert_eq!(fs::metadata(victim.join("file")).unwrap().nlink(), 1, "{what}");
        // An absolute link is resolved within the layer: then the entry is inside, which is as good as refused.
        if let Ok(layer) = result {
            assert!(layer.starts_with(home.path()), "{what}");
            assert!(what.contains("through it"), "{what} was accepted");
        }
    }
}

#[tokio::test]
async fn device_nodes_forged_whiteouts_and_overlay_attributes_are_not_taken_over() {
    let attribute = pax(&[("SCHILY.xattr.trusted.overlay.opaque", b"y"), ("SCHILY.xattr.user.kept", b"1")]);
    let layer = tar(&[
        dir("dev"),
        Entry { kind: b'4', mode: 0o666, ..file("dev/sda", b"") },
        Entry { kind: b'3', mode: 0o666, ..file("dev/zero-zero", b"") },
        Entry { kind: b'x', ..file("PaxHeaders/f", &attribute) },
        dir("plain"),
        Entry { kind: b'6', ..file("pipe", b"") },
    ]);
    let (_home, result) = import_layer(&layer).await;
    let root = result.unwrap();
    assert!(!root.join("dev/sda").exists() && fs::symlink_metadata(root.join("dev/zero-zero")).is_err());
    assert!(fs::metadata(root.join("pipe")).unwrap().file_type().is_fifo());
    let names = |path: &Path| {
        let output = std::process::Command::new("getfattr").args(["-d", "-m", "-"]).arg(path).output();
        output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
    };
    if let Ok(text) = names(&root.join("plain")) {
        assert!(!text.contains("overlay"), "{text}");
    }
}

#[tokio::test]
async fn owners_modes_links_and_whiteouts_come_out_as_they_went_in() {
    let long = format!("{}/file", "d".repeat(90));
    let long_name = format!("{}/{}", "e".repeat(120), "f".repeat(120));
    let header = pax(&[("path", long_name.as_bytes())]);
    let layer = tar(&[
        dir("bin"),
        Entry { mode: 0o4755, owner: (1000, 1001), ..file("bin/su", b"program") },
        hard_link("bin/again", "bin/su"),
        symlink("sbin", "/bin"),
        file("sbin/through", b"x"),
        symlink("dangling", "/nowhere/at/all"),
        file(&long, b"deep"),
        Entry { kind: b'x', ..file("PaxHeaders/long", &header) },
        file("short", b"long"),
        file("bin/.wh.gone", b""),
        dir("replaced"),
        file("replaced/.wh..wh..opq", b""),
        file("twice", b"first"),
        file("twice", b"second"),
    ]);
    let (_home, result) = import_layer(&layer).await;
    let root = result.unwrap();
    let meta = fs::metadata(root.join("bin/su")).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid(), meta.nlink()), (0o4755, 1000, 1001, 2));
    assert_eq!(fs::read_link(root.join("sbin")).unwrap(), Path::new("/bin"));
    assert_eq!(fs::read_to_string(root.join("bin/through")).unwrap(), "x");
    assert_eq!(fs::read_link(root.join("dangling")).unwrap(), Path::new("/nowhere/at/all"));
    assert_eq!(fs::read_to_string(root.join(&long)).unwrap(), "deep");
    assert_eq!(fs::read_to_string(root.join(&long_name)).unwrap(), "long");
    let gone = fs::metadata(root.join("bin/gone")).unwrap();
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    assert!(!root.join("replaced/.wh..wh..opq").exists());
    assert_eq!(fs::read_to_string(root.join("twice")).unwrap(), "second");
}

#[tokio::test]
async fn bombs_and_broken_archives_are_refused() {
    let long = vec![b'a'; 2 << 20];
    let huge_header = Entry { kind: b'L', ..file("././@LongLink", &long) };
    assert!(matches!(import_layer(&tar(&[huge_header])).await.1, Err(ImageError::LimitExceeded { .. })));
    let deep = vec!["d"; 200].join("/");
    let header = pax(&[("path", deep.as_bytes())]);
    let layer = tar(&[Entry { kind: b'x', ..file("PaxHeaders/deep", &header) }, file("x", b"")]);
    assert!(matches!(import_layer(&layer).await.1, Err(ImageError::HostileEntry { .. })));
    let mut cut = tar(&[file("a", &[7; 4096])]);
    cut.truncate(1024);
    assert!(import_layer(&cut).await.1.is_err());

    let temp = tempfile::tempdir().unwrap();
    let store = store(temp.path()).await;
    fs::write(temp.path().join("not-an-archive"), "just text").unwrap();
    let result = store.import(&temp.path().join("not-an-archive")).await;
    assert!(matches!(result, Err(ImageError::NotAnArchive { .. })), "{result:?}");
}

#[tokio::test]
async fn an_imported_image_survives_a_restart_and_goes_with_its_last_use() {
    let temp = tempfile::tempdir().unwrap();
    let built = simple();
    write_layout(&built, "example.org/app:2", &temp.path().join("layout"));
    let opened = store(temp.path()).await;
    let image = only(opened.import(&temp.path().join("layout")).await.unwrap());
    assert_eq!(image.id, built.config_digest);
    assert_eq!(image.repo_tags, ["example.org/app:2"]);
    assert_eq!(image.repo_digests, [format!("example.org/app@{}", built.index_digest)]);
    let rootfs = opened.prepare_rootfs("example.org/app:2", "c1").await.unwrap();
    assert_eq!(fs::read_to_string(rootfs.lower[0].join("etc/b")).unwrap(), "upper");
    assert_eq!(fs::read_to_string(rootfs.lower[1].join("etc/a")).unwrap(), "lower");
    assert!(opened.usage().bytes > 0 && opened.usage().inodes > 2);
    drop(opened);

    // An interrupted run left unfinished work.
    fs::create_dir_all(temp.path().join("store/scratch/1-1/fs")).unwrap();
    let opened = store(temp.path()).await;
    assert_eq!(fs::read_dir(temp.path().join("store/scratch")).unwrap().count(), 0);
    let again = opened.status("example.org/app:2").unwrap();
    // A container has come to use it since.
    assert!(again.last_used >= image.last_used);
    assert_eq!(Image { last_used: image.last_used, ..again }, image);
    assert_eq!(opened.prepare_rootfs(&image.id, "c1").await.unwrap(), rootfs);
    opened.remove("example.org/app:2").await.unwrap();
    opened.remove("example.org/app:2").await.unwrap();
    assert!(opened.list().is_empty());
    assert!(rootfs.lower.iter().all(|layer| layer.exists()), "a container stands on them");
    opened.release_rootfs("c1").await.unwrap();
    opened.release_rootfs("c1").await.unwrap();
    assert!(rootfs.lower.iter().all(|layer| !layer.exists()));
}

#[tokio::test]
async fn a_pull_chooses_the_machine_s_image_and_is_shared_by_callers() {
    let temp = tempfile::tempdir().unwrap();
    let built = simple();
    let registry = Registry::start(&built).await;
    let store = store(temp.path()).await;
    let reference = format!("{}/test/app:v1", registry.address);
    let pulls = (0..8).map(|_| {
        let (store, reference) = (store.clone(), reference.clone());
        tokio::spawn(async move { store.pull(&reference, None).await })
    });
    for pull in pulls.collect::<Vec<_>>() {
        assert_eq!(pull.await.unwrap().unwrap().id, built.config_digest);
    }
    for digest in &built.layer_digests {
        assert_eq!(registry.requests_for(digest), 1);
    }
    let image = store.status(&reference).unwrap();
    assert_eq!(image.repo_digests, [format!("{}/test/app@{}", registry.address, built.index_digest)]);
    store.pull(&format!("{}/test/app@{}", registry.address, built.index_digest), None).await.unwrap();
    assert_eq!(registry.requests_for(&built.layer_digests[0]), 1);
}

#[tokio::test]
async fn what_a_registry_serves_is_believed_only_with_its_digest() {
    let temp = tempfile::tempdir().unwrap();
    let built = simple();
    let registry = Registry::start(&built).await;
    let store = store(temp.path()).await;
    let reference = format!("{}/test/app:v1", registry.address);
    let missing = store.pull(&format!("{}/test/app:none", registry.address), None).await;
    assert!(missing.as_ref().is_err_and(ImageError::is_not_found), "{missing:?}");

    let forged = image_files::gzip(&tar(&[file("etc/b", b"forged")]));
    registry.replace_blob(&built.layer_digests[1], &forged);
    store.pull(&reference, None).await.unwrap_err();
    assert!(store.list().is_empty());
    assert_eq!(fs::read_dir(temp.path().join("store/layers")).unwrap().count(), 0);

    registry.replace_blob(&built.layer_digests[1], &built.blobs[&built.layer_digests[1]]);
    registry.break_once(&built.layer_digests[1]);
    let before = registry.requests_for(&built.layer_digests[1]);
    let image = store.pull(&reference, None).await.unwrap();
    assert_eq!(image.id, built.config_digest);
    assert_eq!(registry.requests_for(&built.layer_digests[1]), before + 2, "the broken try and the good one");
    assert_eq!(registry.requests_for(&built.layer_digests[0]), 1, "it had come whole the first time");
}

#[tokio::test]
async fn unused_images_go_when_asked_or_when_the_disk_is_full_and_others_stay() {
    let temp = tempfile::tempdir().unwrap();
    let opened = store(temp.path()).await;
    let mut images = Vec::new();
    for name in ["used", "pinned", "moved", "moved", "idle"] {
        let content = format!("{name} {}", images.len());
        let built = build(&[tar(&[dir("etc"), file("etc/a", content.as_bytes())])]);
        let layout = temp.path().join(format!("layout-{}", images.len()));
        write_layout(&built, &format!("example.org/{name}:1"), &layout);
        images.push(only(opened.import(&layout).await.unwrap()));
    }
    opened.set_pinned("example.org/pinned:1", true).await.unwrap();
    // A second apart: the clock of a file system may stand still from one import to the next.
    for (image, seconds) in images.iter().zip([100, 99, 98, 97, 96]) {
        let record = format!("store/images/{}.json", image.id.trim_start_matches("sha256:"));
        let record = fs::File::open(temp.path().join(record)).unwrap();
        record.set_modified(std::time::SystemTime::now() - Duration::from_secs(seconds)).unwrap();
    }
    let rootfs = opened.prepare_rootfs("example.org/used:1", "c1").await.unwrap();
    let ids = |images: &[Image]| images.iter().map(|image| image.id.clone()).collect::<Vec<_>>();

    // Just used, all of them; also for a store that was opened again.
    drop(opened);
    let opened = store(temp.path()).await;
    assert_eq!(opened.unused(Duration::from_secs(3600)).await.unwrap(), []);
    let unused = opened.unused(Duration::ZERO).await.unwrap();
    assert_eq!(ids(&unused), ids(&images[2..]), "in the order of their last use");
    let before = opened.usage().bytes;
    let pruned = opened.prune(Duration::ZERO).await.unwrap();
    assert_eq!(ids(&pruned.images), ids(&images[2..]));
    assert_eq!(pruned.freed_bytes, before - opened.usage().bytes);
    assert!(pruned.freed_bytes > 0 && rootfs.lower[0].exists());
    assert_eq!(opened.list().len(), 2);

    // With the container its image is unused, from then on.
    opened.release_rootfs("c1").await.unwrap();
    assert_eq!(opened.unused(Duration::from_secs(3600)).await.unwrap(), []);
    let never = Thresholds { high_percent: 101, low_percent: 0, unused_for: Duration::ZERO };
    assert_eq!(opened.make_room(never).await.unwrap(), Pruned::default());
    let always = Thresholds { high_percent: 0, ..never };
    assert_eq!(ids(&opened.make_room(always).await.unwrap().images), ids(&images[..1]));
    let enough = Thresholds { low_percent: 100, ..always };
    assert_eq!(opened.make_room(enough).await.unwrap(), Pruned::default());
    assert_eq!(ids(&opened.list()), ids(&images[1..2]));
}

#[tokio::test]
async fn what_a_container_changed_is_a_layer_that_tells_what_it_removed() {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    let temp = tempfile::tempdir().unwrap();
    let store = store(temp.path()).await;
    let layer = tar(&[dir("etc"), file("etc/old", b"old")]);
    let image = only(store.import(&docker_archive(&layer, "test/changes:1", temp.path())).await.unwrap());
    let rootfs = store.prepare_rootfs(&image.id, "c1").await.unwrap();
    fs::create_dir(rootfs.upper.join("etc")).unwrap();
    fs::write(rootfs.upper.join("etc/new"), "new").unwrap();
    mknod(&rootfs.upper.join("etc/old"), SFlag::S_IFCHR, Mode::empty(), makedev(0, 0)).unwrap();
    let changes = temp.path().join("changes.tar");
    store.rootfs_changes("c1", &changes).await.unwrap();
    // The same layer once more, as an image's.
    let (_temp, unpacked) = import_layer(&fs::read(&changes).unwrap()).await;
    let unpacked = unpacked.unwrap();
    assert_eq!(fs::read_to_string(unpacked.join("etc/new")).unwrap(), "new");
    let removed = fs::symlink_metadata(unpacked.join("etc/old")).unwrap();
    assert!(removed.file_type().is_char_device() && removed.rdev() == 0);
}

#[tokio::test]
async fn a_pinned_image_stays_until_it_is_unpinned() {
    let temp = tempfile::tempdir().unwrap();
    let layer = tar(&[file("a", b"a")]);
    let archive = docker_archive(&layer, "test/pinned:1", temp.path());
    let store = store(temp.path()).await;
    let image = only(store.import(&archive).await.unwrap());
    assert_eq!(image.repo_tags, ["docker.io/test/pinned:1"]);
    store.set_pinned(&image.id, true).await.unwrap();
    assert!(matches!(store.remove(&image.id).await, Err(ImageError::Pinned { .. })));
    assert!(store.status("test/pinned:1").unwrap().pinned);
    store.set_pinned(&image.id, false).await.unwrap();
    store.remove(&image.id).await.unwrap();
    assert!(store.list().is_empty());
}
