//! What the node's status says of volumes in use: nothing is mounted before it is said there, since whoever detaches volumes goes by
//! it.

use std::time::Duration;

use tokio::sync::{Notify, watch};

use crate::error::CsiError;

/// How long one attempt waits for the API to take the node's status.
const PATIENCE: Duration = Duration::from_secs(10);

/// What was said, and that there is more to say.
#[derive(Debug, Default)]
pub(crate) struct Announcements {
    said: watch::Sender<Vec<String>>,
    asked: Notify,
}

impl Announcements {
    /// The API has taken a status that names these.
    pub(crate) fn said(&self, volumes: &[String]) {
        self.said.send_replace(volumes.to_vec());
    }

    /// Returns when somebody waits for a volume to be named.
    pub(crate) async fn asked(&self) {
        self.asked.notified().await;
    }

    /// Returns when the volume is named in the node's status.
    pub(crate) async fn wait(&self, volume: &str) -> Result<(), CsiError> {
        let mut said = self.said.subscribe();
        if said.borrow_and_update().iter().any(|one| one == volume) {
            return Ok(());
        }
        self.asked.notify_one();
        let named = said.wait_for(|all| all.iter().any(|one| one == volume));
        match tokio::time::timeout(PATIENCE, named).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(CsiError::Refused(
                "Volume has not been added to the list of VolumesInUse in the node's volume status".to_owned(),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_volume_waits_until_the_status_names_it() {
        let announcements = Announcements::default();
        let refused = announcements.wait("v").await.unwrap_err().to_string();
        assert!(refused.contains("VolumesInUse"), "{refused}");
        announcements.asked().await;
        announcements.said(&["v".to_owned()]);
        announcements.wait("v").await.unwrap();
    }
}
