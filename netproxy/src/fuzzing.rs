//! What a fuzzer does to cluster DNS: asks it any bytes, has upstream answer any bytes, and panics when what is sent for
//! that is no answer, too large, or cannot be read.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use hickory_proto::op::Message;
use hickory_proto::rr::Name;
use parking_lot::RwLock;
use serde_json::json;

use crate::cluster::Cluster;
use crate::config::Config;
use crate::dns::{DnsServer, Upstream, Zone, exchange};
use crate::service::{Service, ServiceName};

/// How large answers may be: without EDNS, and as is usual with it.
const LIMITS: [u16; 2] = [512, 1232];

/// A server of a cluster with one Service, `web.default`.
fn server() -> &'static DnsServer {
    static SERVER: OnceLock<DnsServer> = OnceLock::new();
    SERVER.get_or_init(|| {
        let config = Config::default();
        let dns: Vec<_> = config.networks.iter().map(|network| network.cluster_dns).collect();
        let zone = Zone {
            domain: Name::from_ascii("cluster.local.").unwrap_or_default(),
            cluster_cidrs: config.networks.iter().map(|network| network.cluster_cidr).collect(),
            service_cidrs: config.networks.iter().map(|network| network.service_cidr).collect(),
            dns_addresses: dns.clone(),
        };
        let mut cluster = Cluster::default();
        let object = json!({
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {"clusterIP": "10.43.0.5", "ports": [{"name": "http", "port": 80}]},
        });
        let service = serde_json::from_value(object).ok().and_then(|object| Service::read(&object));
        cluster.set_service(&ServiceName::new("default", "web"), service);
        cluster.set_listed();
        let upstream = Upstream::new(Path::new("/nonexistent"), dns, Vec::new());
        DnsServer::new(zone, Arc::new(RwLock::new(cluster)), Arc::new(upstream))
    })
}

/// One input: which limit, how long the question is, the question, and what upstream says.
pub fn dns_message(data: &[u8]) {
    let [choice, length, rest @ ..] = data else { return };
    let limit = LIMITS[usize::from(choice & 1)];
    let (question, answer) = rest.split_at(rest.len().min(usize::from(*length) * 4));
    let Some((request, bytes)) = exchange(server(), question, answer, limit) else { return };
    let sent = Message::from_vec(&bytes);
    let sent = sent.expect("what is sent can be read");
    assert_eq!(sent.metadata.id, request.metadata.id, "the answer is to this question");
    // Several questions are refused with all of them, which nobody asks.
    assert!(bytes.len() <= usize::from(limit) || request.queries.len() > 1, "{} bytes for {limit}", bytes.len());
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::Query;
    use hickory_proto::rr::RecordType;

    #[test]
    fn questions_are_answered() {
        let ask = |name: &str, kind| {
            let mut question = Message::query();
            question.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
            let mut bytes = question.to_vec().unwrap();
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            let (_, sent) = exchange(server(), &bytes, &[], 512).expect("an answer");
            dns_message(&[&[0, (bytes.len() / 4) as u8], bytes.as_slice()].concat());
            Message::from_vec(&sent).unwrap().answers.len()
        };
        assert_eq!(ask("web.default.svc.cluster.local.", RecordType::A), 1);
        assert_eq!(ask("_http._tcp.web.default.svc.cluster.local.", RecordType::SRV), 1);
        assert_eq!(ask("absent.default.svc.cluster.local.", RecordType::A), 0);
    }

    /// The same questions each time, with a few bytes turned; `cargo xtask fuzz` looks for others.
    #[test]
    fn no_message_is_too_much() {
        let mut question = Message::query();
        question.add_query(Query::query(Name::from_ascii("web.default.svc.cluster.local.").unwrap(), RecordType::ANY));
        let bytes = question.to_vec().unwrap();
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..5_000 {
            let mut data = [&[1, 20], bytes.as_slice(), bytes.as_slice()].concat();
            for _ in 0..1 + state % 6 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let position = 2 + (state >> 8) as usize % (data.len() - 2);
                data[position] = state as u8;
            }
            dns_message(&data);
        }
    }
}
