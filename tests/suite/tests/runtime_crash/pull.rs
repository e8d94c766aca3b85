//! A pull whose daemon is killed in the middle of a transfer: the next daemon goes on with the bytes and layers on disk.

use std::time::Instant;

use oarlock_proto::cri;
use oarlock_proto::images::PullRequest;
use oarlock_proto::images::images_client::ImagesClient;

use crate::daemon::Daemon;
use crate::image_files::{Registry, build, dir, file, noise, sha256, tar};
use crate::runtime_daemon::{LIMIT, channel};

fn request(reference: &str) -> cri::PullImageRequest {
    let image = cri::ImageSpec { image: reference.to_owned(), ..cri::ImageSpec::default() };
    cri::PullImageRequest { image: Some(image), ..cri::PullImageRequest::default() }
}

/// Pulls, kills, pulls again; every byte of a layer comes once.
pub async fn goes_on(daemon: &mut Daemon) {
    let layer = |seed, name: &str| tar(&[dir("etc"), file(&format!("etc/{name}"), &noise(seed, 1 << 20))]);
    let tars = [layer(1, "first"), layer(2, "second")];
    let built = build(&tars);
    let [whole, half] = [0, 1].map(|index| built.layer_digests[index].clone());
    let registry = Registry::start(&built).await;
    registry.serve_ranges();
    registry.stall_once(&half);
    let reference = format!("{}/test/app:v1", registry.address);
    daemon.start(None).await;
    let mut images = daemon.images.clone();
    let first = tokio::spawn({
        let request = request(&reference);
        async move { images.pull_image(request).await }
    });
    let arrived = built.blobs[&half].len() / 2;
    // The first layer's chain is the layer itself.
    let expected = [(sha256(&tars[0]), "a layer".to_owned()), (half, format!("{arrived} bytes"))];
    let expected = expected.map(|(id, what)| format!("unfinished {}: {what}", id.trim_start_matches("sha256:")));
    let is_left = |daemon: &Daemon| expected.iter().all(|one| daemon.unfinished_pulls().contains(one));
    let deadline = Instant::now() + LIMIT;
    while !is_left(daemon) {
        assert!(Instant::now() < deadline, "on disk is {:?}, not {expected:?}", daemon.unfinished_pulls());
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    daemon.stop();
    assert!(first.await.expect("the call ends").is_err());

    daemon.start(None).await;
    assert!(is_left(daemon), "on disk is {:?}, not {expected:?}", daemon.unfinished_pulls());
    // The second time as a person does it, who is told how far it is.
    let ask = PullRequest { image: reference.clone() };
    let mut progress = ImagesClient::new(channel(&daemon.socket())).pull(ask).await.expect("a stream").into_inner();
    let mut last = None;
    while let Some(message) = progress.message().await.expect("the second pull") {
        last = Some(message);
    }
    let last = last.filter(|last| last.done).expect("a last message");
    assert_eq!(last.image.expect("the image").id, built.config_digest);
    assert!(last.layers.len() == 2 && last.layers.iter().all(|layer| layer.done), "{:?}", last.layers);
    let layers = built.layer_digests.iter().map(|digest| built.blobs[digest].len()).sum::<usize>();
    assert_eq!(registry.bytes_sent(), layers + 2 * built.blobs[&built.config_digest].len());
    assert_eq!(registry.requests_for(&whole), 1);
    assert_eq!(daemon.unfinished_pulls(), Vec::<String>::new());
    let status = cri::ImageStatusRequest { image: request(&reference).image, verbose: false };
    let image = daemon.images.image_status(status).await.expect("a status").into_inner().image;
    assert_eq!(image.expect("the image is there").id, built.config_digest);
    let remove = cri::RemoveImageRequest { image: request(&reference).image };
    daemon.images.remove_image(remove).await.expect("remove the image");
    daemon.stop();
}
