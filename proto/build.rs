//! Generates the clients and servers with a pure-Rust protobuf compiler, so that no `protoc` is needed on the
//! machine. The messages that the runtime keeps in its records get a serde form too.

/// Messages that are written to disk, directly or inside one another.
const KEPT: &[&str] = &[
    "Capability",
    "CDIDevice",
    "ContainerConfig",
    "ContainerMetadata",
    "Device",
    "DNSConfig",
    "HugepageLimit",
    "IDMapping",
    "ImageSpec",
    "Int64Value",
    "KeyValue",
    "LinuxContainerConfig",
    "LinuxContainerResources",
    "LinuxContainerSecurityContext",
    "LinuxContainerUser",
    "LinuxPodSandboxConfig",
    "LinuxSandboxSecurityContext",
    "Mount",
    "NamespaceOption",
    "PodSandboxConfig",
    "PodSandboxMetadata",
    "PortMapping",
    "SecurityProfile",
    "SELinuxOption",
    "UserNamespace",
];

/// What a kubelet and its plugins speak.
const PLUGINS: &[&str] = &[
    "kubelet/deviceplugin.proto",
    "kubelet/podresources.proto",
    "kubelet/pluginregistration.proto",
    "csi/v1/csi.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=cri/v1/api.proto");
    println!("cargo:rerun-if-changed=oarlock/v1/images.proto");

    let mut cri = tonic_prost_build::configure().build_client(true).build_server(true);
    for message in KEPT {
        let path = format!("runtime.v1.{message}");
        cri = cri.type_attribute(&path, "#[derive(serde::Serialize, serde::Deserialize)] #[serde(default)]");
    }
    // Nothing of Windows is kept: the runtime refuses it before a record is written.
    for field in ["PodSandboxConfig.windows", "ContainerConfig.windows"] {
        cri = cri.field_attribute(format!("runtime.v1.{field}"), "#[serde(skip)]");
    }
    cri.compile_fds(protox::compile(["cri/v1/api.proto"], ["."])?)?;

    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .compile_fds(protox::compile(["oarlock/v1/images.proto"], ["."])?)?;

    for plugin in PLUGINS {
        println!("cargo:rerun-if-changed={plugin}");
        let both = tonic_prost_build::configure().build_client(true).build_server(true);
        both.compile_fds(protox::compile([plugin], ["."])?)?;
    }
    Ok(())
}
