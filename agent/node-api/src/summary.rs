//! `/stats/summary?only_cpu_and_memory=true`: the same document with little else in it. Pure.

use serde_json::{Map, Value};

const NODE: [&str; 4] = ["nodeName", "startTime", "cpu", "memory"];
const POD: [&str; 4] = ["podRef", "startTime", "cpu", "memory"];
const CONTAINER: [&str; 4] = ["name", "startTime", "cpu", "memory"];

pub(crate) fn only_cpu_and_memory(stats: &Value) -> Value {
    let mut node = pick(&stats["node"], &NODE);
    if let Some(containers) = stats["node"].get("systemContainers") {
        node.insert("systemContainers".to_string(), each(containers, |container| pick(container, &CONTAINER)));
    }
    let pods = each(&stats["pods"], |pod| {
        let mut kept = pick(pod, &POD);
        kept.insert("containers".to_string(), each(&pod["containers"], |container| pick(container, &CONTAINER)));
        kept
    });
    Value::Object(Map::from_iter([("node".to_string(), Value::Object(node)), ("pods".to_string(), pods)]))
}

fn pick(value: &Value, keys: &[&str]) -> Map<String, Value> {
    let found = keys.iter().filter_map(|key| Some((key.to_string(), value.get(*key)?.clone())));
    found.collect()
}

fn each(list: &Value, keep: impl Fn(&Value) -> Map<String, Value>) -> Value {
    Value::Array(list.as_array().into_iter().flatten().map(|item| Value::Object(keep(item))).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_cpu_and_memory_are_left() {
        let stats = json!({"node": {"nodeName": "n", "cpu": {"x": 1}, "fs": {}, "runtime": {}},
            "pods": [{"podRef": {"name": "p"}, "memory": {"y": 2}, "network": {}, "volume": [],
                "containers": [{"name": "c", "cpu": {}, "rootfs": {}, "logs": {}}]}]});
        let expected = json!({"node": {"nodeName": "n", "cpu": {"x": 1}},
            "pods": [{"podRef": {"name": "p"}, "memory": {"y": 2}, "containers": [{"name": "c", "cpu": {}}]}]});
        assert_eq!(only_cpu_and_memory(&stats), expected);
    }
}
