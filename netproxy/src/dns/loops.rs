//! Upstream resolvers that ask us, by themselves or through others: a question to them would never end.
//!
//! Each resolver is asked for a name that nobody else can know, and whoever of the names comes back here names a loop, however
//! many resolvers are in between. Such a resolver is left out until a later look finds that it has become sound. Names that
//! are not of this process are passed on, so that a circle through several nodes is found by each of them.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::Query;
use hickory_proto::rr::{Name, RecordType};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::ask::ask;
use super::upstream::Upstream;

/// No resolver takes this for a name of its own network.
const SUFFIX: &str = "oarlock-loop";
/// A resolver that is not in a loop is looked at so often; a new one at once.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);
const CHANGE_INTERVAL: Duration = Duration::from_secs(2);

/// What is known about loops.
#[derive(Debug, Default)]
pub struct Loops {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Names under way, with whom they were asked of.
    asked: HashMap<u64, SocketAddr>,
    /// Those that came back.
    returned: HashSet<u64>,
    looping: HashSet<SocketAddr>,
}

/// The number in a name that was made here or by another node.
fn token(name: &Name) -> Option<u64> {
    let mut labels = name.iter();
    let (first, last, none) = (labels.next()?, labels.next()?, labels.next());
    if none.is_some() || !last.eq_ignore_ascii_case(SUFFIX.as_bytes()) {
        return None;
    }
    u64::from_str_radix(std::str::from_utf8(first).ok()?, 16).ok()
}

impl Loops {
    /// Takes note of a question that came in; says whether it is one of this process, which needs no answer from elsewhere.
    pub fn hear(&self, name: &Name) -> bool {
        let Some(token) = token(name) else { return false };
        let mut state = self.state.lock();
        let is_own = state.asked.contains_key(&token);
        if is_own {
            state.returned.insert(token);
        }
        is_own
    }

    pub fn is_looping(&self, server: &SocketAddr) -> bool {
        self.state.lock().looping.contains(server)
    }

    fn begin(&self, token: u64, server: SocketAddr) {
        self.state.lock().asked.insert(token, server);
    }

    fn end(&self, token: u64, server: SocketAddr) {
        let mut state = self.state.lock();
        state.asked.remove(&token);
        let (returned, known) = (state.returned.remove(&token), state.looping.contains(&server));
        if returned && !known {
            warn!(%server, "resolver asks this one in turn and is left out: point it, or this node's resolv.conf, elsewhere");
            state.looping.insert(server);
        } else if !returned && known {
            info!(%server, "resolver is in no loop any more");
            state.looping.remove(&server);
        }
    }
}

/// Looks for loops until shutdown.
pub async fn watch(upstream: Arc<Upstream>, shutdown: CancellationToken) {
    let mut looked_at: HashSet<SocketAddr> = HashSet::new();
    let mut since = tokio::time::Instant::now();
    loop {
        if since.elapsed() >= LOOK_INTERVAL {
            looked_at.clear();
            since = tokio::time::Instant::now();
        }
        let servers = upstream.all_servers();
        looked_at.retain(|server| servers.contains(server));
        for server in servers {
            if looked_at.insert(server) {
                tokio::select! {
                    () = look(&upstream, server) => {}
                    () = shutdown.cancelled() => return,
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(CHANGE_INTERVAL) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

async fn look(upstream: &Upstream, server: SocketAddr) {
    let token: u64 = rand::random();
    let Ok(name) = Name::from_ascii(format!("{token:016x}.{SUFFIX}.")) else { return };
    upstream.loops.begin(token, server);
    // What is answered does not matter, and silence tells nothing.
    let _ = ask(server, &Query::query(name, RecordType::HINFO), false).await;
    upstream.loops.end(token, server);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_names_that_come_back_are_a_loop() {
        let loops = Loops::default();
        let server: SocketAddr = "192.0.2.1:53".parse().unwrap();
        let name = |text: &str| Name::from_ascii(text).unwrap();
        loops.begin(0xabc, server);
        assert!(!loops.hear(&name("0000000000000abd.oarlock-loop.")), "another node's");
        assert!(!loops.hear(&name("www.example.org.")));
        assert!(!loops.hear(&name("0000000000000abc.oarlock-loop.org.")));
        assert!(loops.hear(&name("0000000000000ABC.OARLOCK-loop.")), "letters may change on the way");
        loops.end(0xabc, server);
        assert!(loops.is_looping(&server));
        loops.begin(1, server);
        loops.end(1, server);
        assert!(!loops.is_looping(&server));
    }
}
