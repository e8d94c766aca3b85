//! Tests of finding plugins, with plugins that serve the registration protocol on real sockets.

use parking_lot::Mutex;
use tonic::{Request, Response, Status};
use wire::registration_server::{Registration, RegistrationServer};

use super::*;

/// A plugin of a kind and name that notes what it was told.
#[derive(Clone)]
struct FakePlugin {
    kind: &'static str,
    name: &'static str,
    told: tokio::sync::mpsc::UnboundedSender<wire::RegistrationStatus>,
}

#[tonic::async_trait]
impl Registration for FakePlugin {
    async fn get_info(&self, _: Request<wire::InfoRequest>) -> Result<Response<wire::PluginInfo>, Status> {
        let info = wire::PluginInfo {
            r#type: self.kind.to_owned(),
            name: self.name.to_owned(),
            endpoint: "/run/real.sock".to_owned(),
            supported_versions: vec!["1.0.0".to_owned()],
        };
        Ok(Response::new(info))
    }

    async fn notify_registration_status(
        &self,
        status: Request<wire::RegistrationStatus>,
    ) -> Result<Response<wire::RegistrationStatusResponse>, Status> {
        let _ = self.told.send(status.into_inner());
        Ok(Response::new(wire::RegistrationStatusResponse {}))
    }
}

struct Notes {
    taken: Mutex<Vec<String>>,
    gone: tokio::sync::mpsc::UnboundedSender<String>,
    refuse_first: Mutex<u32>,
}

#[async_trait]
impl Taker for Notes {
    async fn take(&self, plugin: &Plugin) -> Result<(), String> {
        let mut refusals = self.refuse_first.lock();
        if *refusals > 0 {
            *refusals -= 1;
            return Err("not yet".to_owned());
        }
        self.taken.lock().push(format!("{} at {}", plugin.name, plugin.endpoint.display()));
        Ok(())
    }

    async fn dismiss(&self, plugin: &Plugin) {
        let _ = self.gone.send(plugin.name.clone());
    }
}

fn serve(
    path: &Path,
    kind: &'static str,
) -> (tokio::sync::mpsc::UnboundedReceiver<wire::RegistrationStatus>, CancellationToken) {
    let (told, hears) = tokio::sync::mpsc::unbounded_channel();
    let stop = CancellationToken::new();
    let server = RegistrationServer::new(FakePlugin { kind, name: "driver.example.com", told });
    tokio::spawn(socket::serve(socket::listen(path).unwrap(), server, stop.clone()));
    (hears, stop)
}

#[tokio::test]
async fn a_plugin_is_taken_told_and_let_go_with_its_socket() {
    let dir = tempfile::tempdir().unwrap();
    let (gone, mut went) = tokio::sync::mpsc::unbounded_channel();
    let notes = Arc::new(Notes { taken: Mutex::default(), gone, refuse_first: Mutex::new(1) });
    let stop = CancellationToken::new();
    let takers: Takers = BTreeMap::from([("CSIPlugin", notes.clone() as Arc<dyn Taker>)]);
    let watching = tokio::spawn(watch(dir.path().join("registry"), takers, stop.clone()));
    // In a directory of its own that is made later.
    let path = dir.path().join("registry/driver/reg.sock");
    let (mut hears, _serving) = serve(&path, "CSIPlugin");
    let refused = hears.recv().await.unwrap();
    assert_eq!((refused.plugin_registered, refused.error.as_str()), (false, "not yet"));
    assert!(hears.recv().await.unwrap().plugin_registered, "asked again");
    assert_eq!(*notes.taken.lock(), ["driver.example.com at /run/real.sock"]);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(went.recv().await.unwrap(), "driver.example.com");
    stop.cancel();
    watching.await.unwrap();
}

#[tokio::test]
async fn a_kind_that_nobody_takes_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.sock");
    let (mut hears, _serving) = serve(&path, "OtherPlugin");
    let stop = CancellationToken::new();
    tokio::spawn(watch(dir.path().to_owned(), Takers::new(), stop.clone()));
    let told = hears.recv().await.unwrap();
    assert!(told.error.starts_with("no handler registered for plugin type: OtherPlugin"), "{}", told.error);
    stop.cancel();
}
