//! What other tables of nftables do to packets of pods: found in the ruleset, with the chain or rule named. Iptables' rules are
//! among them where iptables is built on nftables; those of the older iptables are asked of its own program. Nothing is
//! changed.

use std::fs;
use std::process::Command;

use serde_json::Value;

/// The older iptables of a family: the kernel's list of its tables, and its program.
const LEGACY: [(&str, &str); 2] =
    [("/proc/net/ip_tables_names", "iptables-legacy"), ("/proc/net/ip6_tables_names", "ip6tables-legacy")];

/// What keeps packets from pods, a sentence each; empty when nothing does.
///
/// # Errors
/// Why it cannot be told, a sentence.
pub(crate) fn conflicts() -> Result<Vec<String>, String> {
    let text = answer("nft", &["--json", "--handle", "list", "ruleset"])?;
    let ruleset = serde_json::from_str(&text).map_err(|error| format!("nft's list is not readable: {error}"))?;
    let mut found = in_ruleset(&ruleset);
    for (tables, program) in LEGACY {
        let filters = fs::read_to_string(tables).is_ok_and(|names| names.lines().any(|name| name == "filter"));
        if filters {
            found.extend(in_legacy(program, &answer(program, &["-S"])?));
        }
    }
    Ok(found)
}

fn answer(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output =
        Command::new(program).args(arguments).output().map_err(|error| format!("{program} cannot be run: {error}"))?;
    if !output.status.success() {
        return Err(format!("{program} fails: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// From the rules as `iptables -S` prints them.
fn in_legacy(program: &str, rules: &str) -> Vec<String> {
    let chain = |line: &str| -> Option<(String, &'static str)> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let name = *words.get(1)?;
        let what = match words.as_slice() {
            ["-P", _, "DROP"] => format!("the policy of {program}'s chain {name}"),
            ["-A", _, "-j", "DROP" | "REJECT", ..] => format!("the rule `{line}` of {program}"),
            _ => return None,
        };
        match name {
            "FORWARD" => Some((what, "drops forwarded packets that no rule accepts")),
            "INPUT" => Some((what, "drops packets to this node that no rule accepts")),
            _ => None,
        }
    };
    rules.lines().filter_map(chain).map(|(what, does)| format!("{what} {does}")).collect()
}

fn text<'a>(object: &'a Value, field: &str) -> &'a str {
    object[field].as_str().unwrap_or_default()
}

fn in_ruleset(ruleset: &Value) -> Vec<String> {
    let items = || ruleset["nftables"].as_array().into_iter().flatten();
    let mut found = Vec::new();
    for chain in items().filter_map(|item| item.get("chain")) {
        let hook = text(chain, "hook");
        if !matches!(hook, "forward" | "input") || text(chain, "table").starts_with("oarlock-") {
            continue;
        }
        let (family, table, name) = (text(chain, "family"), text(chain, "table"), text(chain, "name"));
        if family == "bridge" || family == "arp" || family == "netdev" {
            continue;
        }
        let same = |rule: &&Value| {
            [("family", family), ("table", table), ("chain", name)]
                .iter()
                .all(|(field, value)| text(rule, field) == *value)
        };
        let refusing = items().filter_map(|item| item.get("rule")).filter(same).find(|rule| refuses_everything(rule));
        let what = match (refusing, text(chain, "policy")) {
            (Some(rule), _) => format!("rule {} of chain {family} {table} {name}", rule["handle"]),
            (None, "drop") => format!("the policy of chain {family} {table} {name}"),
            _ => continue,
        };
        found.push(match hook {
            "forward" => format!("{what} drops forwarded packets that no rule accepts"),
            _ => format!("{what} drops packets to this node that no rule accepts"),
        });
    }
    found
}

/// Whether a rule ends every packet's way: it asks for nothing, or counts at most, and says no.
fn refuses_everything(rule: &Value) -> bool {
    let statements = rule["expr"].as_array().map(Vec::as_slice).unwrap_or_default();
    let says_no = |statement: &Value| statement.get("drop").is_some() || statement.get("reject").is_some();
    let asks = |statement: &Value| statement.get("counter").is_none() && statement.get("log").is_none();
    statements.iter().any(says_no) && statements.iter().filter(|one| asks(one)).all(says_no)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn chain(table: &str, name: &str, hook: &str, policy: &str) -> Value {
        json!({"chain": {"family": "ip", "table": table, "name": name, "handle": 1, "type": "filter", "hook": hook,
                         "prio": 0, "policy": policy}})
    }

    fn rule(table: &str, chain: &str, handle: u32, expressions: Value) -> Value {
        json!({"rule": {"family": "ip", "table": table, "chain": chain, "handle": handle, "expr": expressions}})
    }

    #[test]
    fn what_drops_by_default_is_named() {
        let state = json!({"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "invalid"}});
        let ruleset = json!({"nftables": [
            {"metainfo": {"version": "1.1.3"}},
            chain("filter", "FORWARD", "forward", "drop"),
            chain("firewalld", "filter_FORWARD", "forward", "accept"),
            rule("firewalld", "filter_FORWARD", 7, json!([state, {"drop": null}])),
            rule("firewalld", "filter_FORWARD", 9, json!([{"counter": {"packets": 0, "bytes": 0}}, {"reject": {"type": "icmpx"}}])),
            chain("mine", "input", "input", "drop"),
            chain("fine", "forward", "forward", "accept"),
            rule("fine", "forward", 3, json!([state, {"drop": null}])),
            chain("oarlock-policy", "forward", "forward", "drop"),
            chain("nat", "postrouting", "postrouting", "drop"),
        ]});
        assert_eq!(
            in_ruleset(&ruleset),
            [
                "the policy of chain ip filter FORWARD drops forwarded packets that no rule accepts",
                "rule 9 of chain ip firewalld filter_FORWARD drops forwarded packets that no rule accepts",
                "the policy of chain ip mine input drops packets to this node that no rule accepts",
            ]
        );
        assert!(in_ruleset(&json!({})).is_empty());
    }

    #[test]
    fn what_the_older_iptables_drops_is_named_too() {
        let rules = "-P INPUT ACCEPT\n-P FORWARD DROP\n-P OUTPUT DROP\n-N DOCKER\n-A INPUT -i lo -j ACCEPT\n-A INPUT -j REJECT --reject-with icmp-port-unreachable\n-A FORWARD -s 192.0.2.1/32 -j DROP\n";
        assert_eq!(
            in_legacy("iptables-legacy", rules),
            [
                "the policy of iptables-legacy's chain FORWARD drops forwarded packets that no rule accepts",
                "the rule `-A INPUT -j REJECT --reject-with icmp-port-unreachable` of iptables-legacy drops packets to this node that no rule accepts",
            ]
        );
    }
}
