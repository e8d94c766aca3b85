//! CNI configurations, and results of plugins, that are any text: what can be read says the same when it is written and read
//! again.
#![no_main]

use oarlock_cni::config::{NetworkList, PluginExtra};
use oarlock_cni::{CniResult, Version};

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(list) = NetworkList::parse(text) {
        for index in 0..list.plugins.len() {
            let config = list.plugin_config(index, &PluginExtra::default());
            assert!(config.contains_key("name") && config.contains_key("cniVersion"));
            let _ = list.plugin_type(index);
        }
    }
    if let Ok(result) = serde_json::from_str::<CniResult>(text) {
        let written = result.to_json(Version::default());
        let read: CniResult = serde_json::from_value(written).expect("what was written can be read");
        assert_eq!(read.container_ips(), result.container_ips());
    }
});
