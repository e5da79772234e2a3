//! Services that no platform announces (`ServiceEntry`).

use super::{LabelsSelector, Port};
use crate::config::decode::{enumeration, message};
use crate::model::workload::WorkloadEntry;

message! {
    /// A service declared by hand.
    pub struct ServiceEntry {
        /// Host names.
        hosts: Vec<String> = "hosts";
        /// Virtual addresses: IP addresses or ranges.
        addresses: Vec<String> = "addresses";
        /// Ports.
        ports: Vec<Port> = "ports";
        /// Inside or outside the mesh.
        location: ServiceEntryLocation = "location";
        /// How endpoints are found.
        resolution: ServiceEntryResolution = "resolution";
        /// The endpoints.
        endpoints: Vec<WorkloadEntry> = "endpoints";
        /// Workloads of the same namespace that are the endpoints.
        workload_selector: Option<LabelsSelector> = "workloadSelector";
        /// Namespaces that see it: `*`, `.`, `~` or names; none takes the mesh's default.
        export_to: Vec<String> = "exportTo";
        /// Names of which the server's certificate must have one.
        subject_alt_names: Vec<String> = "subjectAltNames";
    }
}

enumeration! {
    /// Inside or outside the mesh.
    pub enum ServiceEntryLocation {
        /// Outside.
        MeshExternal = "MESH_EXTERNAL",
        /// Inside.
        MeshInternal = "MESH_INTERNAL",
    }

    /// How the endpoints of a service are found.
    pub enum ServiceEntryResolution {
        /// The address that the client asked for.
        None = "NONE",
        /// The declared endpoints.
        Static = "STATIC",
        /// Every address that DNS returns.
        Dns = "DNS",
        /// One address that DNS returns.
        DnsRoundRobin = "DNS_ROUND_ROBIN",
        /// By the host of each request.
        DynamicDns = "DYNAMIC_DNS",
    }
}
