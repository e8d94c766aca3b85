//! Whether pods can join the network now: what the plugins answer to CNI STATUS.
//!
//! Kubelets ask every few seconds; the plugins are asked more seldom, and at once after the configuration changed.

use std::time::{Duration, Instant};

use oarlock_cni::NetworkList;
use tokio::sync::Mutex;

use crate::core::Core;
use crate::error::chain;

/// How long a good answer counts.
const GOOD_FOR: Duration = Duration::from_secs(30);
/// How long a bad one does: who repairs a network wants to see it.
const BAD_FOR: Duration = Duration::from_secs(2);
/// How long the plugins may take.
const LIMIT: Duration = Duration::from_secs(10);

/// The last answer.
#[derive(Debug, Default)]
pub(crate) struct NetworkStatus {
    last: Mutex<Option<Answer>>,
}

#[derive(Debug)]
struct Answer {
    at: Instant,
    /// Which network was asked.
    network: NetworkList,
    problem: Option<String>,
}

impl Answer {
    fn counts(&self, network: &NetworkList) -> bool {
        let limit = if self.problem.is_none() { GOOD_FOR } else { BAD_FOR };
        self.network == *network && self.at.elapsed() < limit
    }
}

impl NetworkStatus {
    /// Why no pod can join; None when one can.
    pub(crate) async fn problem(&self, core: &Core) -> Option<String> {
        let network = match core.cni.default_network() {
            Ok(network) => network,
            Err(error) => return Some(chain(&error)),
        };
        // Whoever asks meanwhile waits for the same answer.
        let mut last = self.last.lock().await;
        if let Some(answer) = last.as_ref().filter(|answer| answer.counts(&network)) {
            return answer.problem.clone();
        }
        let problem = match tokio::time::timeout(LIMIT, core.cni.status()).await {
            Ok(answer) => answer.err().map(|error| chain(&error)),
            Err(_) => Some(format!("the plugins did not answer STATUS within {} s", LIMIT.as_secs())),
        };
        *last = Some(Answer { at: Instant::now(), network, problem: problem.clone() });
        problem
    }
}
