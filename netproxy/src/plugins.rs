//! What the CNI plugins wrote to nftables for pods that run, put back when somebody has flushed it: plugins themselves are
//! only called when pods come and go.

use std::path::Path;
use std::time::Duration;

use oarlock_cni_table::{Restorer, STATE_DIR};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Each look is one question to the kernel as long as nobody has changed any rules.
const LOOK_INTERVAL: Duration = Duration::from_secs(3);

/// Looks until shutdown.
pub async fn keep(shutdown: CancellationToken) {
    let mut restorer = Restorer::new(Path::new(STATE_DIR));
    let mut told: Vec<String> = Vec::new();
    let mut look = tokio::time::interval(LOOK_INTERVAL);
    loop {
        tokio::select! {
            _ = look.tick() => {}
            () = shutdown.cancelled() => return,
        }
        let restored = tokio::task::spawn_blocking(move || {
            let restored = restorer.restore();
            (restorer, restored)
        });
        let Ok((kept, restored)) = restored.await else { return };
        restorer = kept;
        // Once for each, although it is tried again with every look.
        for refusal in restorer.refused().iter().filter(|refusal| !told.contains(&refusal.to_string())) {
            warn!(
                error = refusal as &dyn std::error::Error,
                "kernel refuses rules of pods' host ports or masquerading; trying again"
            );
        }
        told = restorer.refused().iter().map(ToString::to_string).collect();
        match restored {
            Ok(0) => {}
            Ok(count) => info!(count, "rules of pods' host ports and masquerading were gone and are back"),
            Err(error) => warn!(
                error = &error as &dyn std::error::Error,
                "rules of pods' host ports and masquerading cannot be looked at"
            ),
        }
    }
}
