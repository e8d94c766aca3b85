//! What a device plugin says of its devices, put into a container's configuration. Pure.

use oarlock_plugins::Answer;
use oarlock_proto::cri;

/// Adds devices, mounts, variables, annotations and names of the Container Device Interface. What the container says itself
/// stays as it is.
pub(crate) fn add(config: &mut cri::ContainerConfig, answer: &Answer) {
    for device in &answer.devices {
        let device = cri::Device {
            container_path: device.container_path.clone(),
            host_path: device.host_path.clone(),
            permissions: device.permissions.clone(),
        };
        if config.devices.iter().all(|known| known.container_path != device.container_path) {
            config.devices.push(device);
        }
    }
    for mount in &answer.mounts {
        if config.mounts.iter().all(|known| known.container_path != mount.container_path) {
            config.mounts.push(cri::Mount {
                container_path: mount.container_path.clone(),
                host_path: mount.host_path.clone(),
                readonly: mount.read_only,
                ..Default::default()
            });
        }
    }
    let known = |name: &str, config: &cri::ContainerConfig| config.envs.iter().any(|env| env.key == name);
    let mut variables: Vec<_> = answer.envs.iter().filter(|(name, _)| !known(name, config)).collect();
    variables.sort();
    let variables =
        variables.into_iter().map(|(key, value)| cri::KeyValue { key: key.clone(), value: value.clone().into() });
    config.envs.splice(0..0, variables.collect::<Vec<_>>());
    for (name, value) in &answer.annotations {
        config.annotations.entry(name.clone()).or_insert_with(|| value.clone());
    }
    for device in &answer.cdi_devices {
        let device = cri::CdiDevice { name: device.name.clone() };
        if !config.cdi_devices.contains(&device) {
            config.cdi_devices.push(device);
        }
    }
}

#[cfg(test)]
mod tests {
    use oarlock_proto::deviceplugin as wire;

    use super::*;

    #[test]
    fn everything_a_plugin_says_reaches_the_runtime_and_the_pod_has_the_last_word() {
        let own = cri::KeyValue { key: "A".into(), value: "pod".into() };
        let mut config = cri::ContainerConfig { envs: vec![own], ..Default::default() };
        let answer = Answer {
            envs: [("A".into(), "plugin".into()), ("B".into(), "2".into())].into(),
            mounts: vec![wire::Mount { container_path: "/lib/x".into(), host_path: "/opt/x".into(), read_only: true }],
            devices: vec![wire::DeviceSpec {
                container_path: "/dev/x".into(),
                host_path: "/dev/x0".into(),
                permissions: "rw".into(),
            }],
            annotations: [("note".into(), "1".into())].into(),
            cdi_devices: vec![wire::CdiDevice { name: "example.com/x=0".into() }],
        };
        add(&mut config, &answer);
        add(&mut config, &answer);
        let shown: Vec<_> = config.envs.iter().map(|env| env.key.as_str()).collect();
        assert_eq!(shown, ["B", "A"]);
        assert_eq!((config.mounts.len(), config.devices.len(), config.cdi_devices.len()), (1, 1, 1));
        assert!(config.mounts[0].readonly);
        assert_eq!(config.devices[0].permissions, "rw");
        assert_eq!(config.annotations["note"], "1");
    }
}
