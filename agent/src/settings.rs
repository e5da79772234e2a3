//! The files of an installed agent: its settings, and the services of this machine in a folder beside them.
//!
//! ```yaml
//! # /etc/istio/agent.yaml, with the defaults
//! dataDir: /var/lib/istio-agent
//! services: /etc/istio/services.d
//! address: 10.0.0.7            # where other proxies reach this machine; by default as it reaches the control plane
//! loopbackBlock: 127.240.16.0/20   # own addresses for services, where traffic is not captured
//! admin: 127.0.0.1:15000
//! stats: 0.0.0.0:15090
//! readiness: 0.0.0.0:15021
//! dns: ["127.0.0.1:15053", "[::1]:15053"]   # where names of the mesh are answered
//! dnsUpstreams: []             # who answers all others; by default the servers in /etc/resolv.conf
//! workers: 0                   # 0: one for each core
//! drainSeconds: 5
//! locality: region/zone/subzone
//! network: ""
//! execProbes: false            # whether probes of a WorkloadGroup may run commands here, with the agent's rights
//! ```
//!
//! ```yaml
//! # /etc/istio/services.d/billing.yaml
//! name: billing
//! labels: {app: billing, version: v2}
//! ports: {http: 8080}          # port of this workload for a service's port, by its name, where they differ
//! forward: {8080: "127.0.0.1:8080"}  # where the application listens, without capture
//! probe: {httpGet: {path: /ready, port: 8080}}  # as in a WorkloadGroup, whose probe it outranks
//! ```

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::dns;
use crate::probe::Probe;

/// The settings of an agent.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Settings {
    /// Folder for key, certificate and membership.
    pub data_dir: PathBuf,
    /// Folder with a file for each service.
    pub services: PathBuf,
    /// Address other proxies reach the workload at; when not given, the one from which the control plane is reached.
    pub address: Option<IpAddr>,
    /// Loopback addresses for listeners without traffic capture, `127.240.16.0/20`.
    pub loopback_block: Option<String>,
    /// Address of the proxy's admin port.
    pub admin: SocketAddr,
    /// Address of `/stats/prometheus`.
    pub stats: SocketAddr,
    /// Address of `/healthz/ready`.
    pub readiness: SocketAddr,
    /// Addresses at which names of the mesh are answered, UDP and TCP.
    pub dns: Vec<SocketAddr>,
    /// DNS servers for all other names; those of `/etc/resolv.conf` when there is none.
    pub dns_upstreams: Vec<SocketAddr>,
    /// Worker threads; 0: one for each core.
    pub workers: usize,
    /// How long open requests may take to finish at the end, in seconds.
    pub drain_seconds: u64,
    /// Where the machine is, `region/zone/subzone`.
    pub locality: String,
    /// Network of the machine.
    pub network: String,
    /// Whether a probe that the control plane tells may run a command on this machine, with the agent's rights.
    pub exec_probes: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            data_dir: "/var/lib/istio-agent".into(),
            services: "/etc/istio/services.d".into(),
            address: None,
            loopback_block: None,
            admin: SocketAddr::from(([127, 0, 0, 1], 15000)),
            stats: SocketAddr::from(([0, 0, 0, 0], 15090)),
            readiness: SocketAddr::from(([0, 0, 0, 0], 15021)),
            dns: [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()]
                .map(|address| SocketAddr::new(address, dns::AGENT_PORT))
                .to_vec(),
            dns_upstreams: Vec::new(),
            workers: 0,
            drain_seconds: 5,
            locality: String::new(),
            network: String::new(),
            exec_probes: false,
        }
    }
}

/// A service of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Service {
    /// Name, unique in its namespace.
    pub name: String,
    /// Labels: services of the mesh select on them.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Service port name to workload port, where they differ.
    #[serde(default)]
    pub ports: BTreeMap<String, u16>,
    /// Workload port to the address where the application listens.
    #[serde(default)]
    pub forward: BTreeMap<u16, SocketAddr>,
    /// How the application is checked, whatever the control plane says.
    #[serde(default)]
    pub probe: Option<Probe>,
}

/// Why the files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// A file or folder cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file says something that is no setting.
    #[error("{path}: {told}")]
    Wrong {
        /// Which.
        path: PathBuf,
        /// What, with its place.
        told: String,
    },
    /// The agent serves one workload.
    #[error("{folder} has {}: this agent serves one workload; leave one file there", .files.join(", "))]
    Several {
        /// The folder.
        folder: PathBuf,
        /// The files in it.
        files: Vec<String>,
    },
}

impl Settings {
    /// Reads the settings from a file.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or says something that is no setting.
    pub fn read(path: &Path) -> Result<Self, SettingsError> {
        let text = text(path)?;
        // A file with nothing but comments says nothing.
        let says = text.lines().any(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#'));
        if says { parse(path, &text) } else { Ok(Self::default()) }
    }

    /// The service of this machine: of the one `*.yaml` file in the folder; `None` when there is no such file.
    ///
    /// # Errors
    ///
    /// The folder or the file cannot be read, the file says something that is no service, or there are several.
    pub fn service(&self) -> Result<Option<Service>, SettingsError> {
        let folder = &self.services;
        let read = |source| SettingsError::Read { path: folder.clone(), source };
        let entries = match std::fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(read(error)),
        };
        let mut files = entries
            .map(|entry| entry.map(|entry| entry.path()))
            .filter(|path| path.as_ref().map_or(true, |path| path.extension() == Some(OsStr::new("yaml"))))
            .collect::<Result<Vec<_>, _>>()
            .map_err(read)?;
        files.sort();
        match files.as_slice() {
            [] => Ok(None),
            [one] => parse(one, &text(one)?).map(Some),
            several => {
                let names = several.iter().filter_map(|path| path.file_name()).map(OsStr::to_string_lossy);
                let files = names.map(|name| name.into_owned()).collect();
                Err(SettingsError::Several { folder: folder.clone(), files })
            }
        }
    }
}

fn text(path: &Path) -> Result<String, SettingsError> {
    std::fs::read_to_string(path).map_err(|source| SettingsError::Read { path: path.to_owned(), source })
}

fn parse<T: serde::de::DeserializeOwned>(path: &Path, text: &str) -> Result<T, SettingsError> {
    serde_saphyr::from_str(text)
        .map_err(|error| SettingsError::Wrong { path: path.to_owned(), told: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Files(tempfile::TempDir);

    impl Files {
        fn of(files: &[(&str, &str)]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            for (name, text) in files {
                std::fs::write(folder.path().join(name), text).unwrap();
            }
            Self(folder)
        }

        fn settings(&self) -> Result<Settings, SettingsError> {
            Settings::read(&self.0.path().join("agent.yaml"))
        }

        fn service(&self) -> Result<Option<Service>, SettingsError> {
            Settings { services: self.0.path().join("services.d"), ..Settings::default() }.service()
        }

        fn with_services(services: &[(&str, &str)]) -> Self {
            let files = Self::of(&[]);
            std::fs::create_dir(files.0.path().join("services.d")).unwrap();
            for (name, text) in services {
                std::fs::write(files.0.path().join("services.d").join(name), text).unwrap();
            }
            files
        }
    }

    #[test]
    fn a_file_of_comments_leaves_the_defaults() {
        let files = Files::of(&[("agent.yaml", "# nothing\n\n  # admin: x\n")]);
        assert_eq!(files.settings().unwrap(), Settings::default());
    }

    #[test]
    fn what_is_said_counts_and_what_is_no_setting_is_told_with_its_place() {
        let files = Files::of(&[("agent.yaml", "address: 10.0.0.7\nadmin: 127.0.0.1:1\n")]);
        let settings = files.settings().unwrap();
        assert_eq!(settings.address, Some(IpAddr::from([10, 0, 0, 7])));
        assert_eq!(settings.admin.port(), 1);
        for (text, told) in [("adress: 10.0.0.7\n", "adress"), ("workers: many\n", "line 1")] {
            let error = Files::of(&[("agent.yaml", text)]).settings().unwrap_err().to_string();
            assert!(error.contains(told) && error.contains("agent.yaml"), "{error}");
        }
    }

    #[test]
    fn the_service_is_the_one_yaml_file_of_the_folder() {
        assert_eq!(Files::of(&[]).service().unwrap(), None, "no folder, no service");
        let one = "name: billing\nlabels: {app: billing}\nforward: {8080: \"127.0.0.1:80\"}\n";
        let files = Files::with_services(&[("billing.yaml", one), ("old.yaml.bak", "x"), ("README", "x")]);
        let service = files.service().unwrap().unwrap();
        assert_eq!((service.name.as_str(), service.labels["app"].as_str()), ("billing", "billing"));
        assert_eq!(service.forward[&8080], SocketAddr::from(([127, 0, 0, 1], 80)));
        assert_eq!(service.probe, None);
        let probed = format!("{one}probe: {{exec: {{command: [/bin/check]}}, periodSeconds: 5}}\n");
        let probe = Files::with_services(&[("a.yaml", &probed)]).service().unwrap().unwrap().probe.unwrap();
        assert_eq!((probe.check.to_string().as_str(), probe.pace.period.as_secs()), ("`/bin/check`", 5));
        let wrong = Files::with_services(&[("a.yaml", &format!("{one}probe: {{tcpSocket: {{port: 0}}}}\n"))]);
        let error = wrong.service().unwrap_err().to_string();
        assert!(error.contains("0 is not a port") && error.contains("a.yaml"), "{error}");
        let two = Files::with_services(&[("a.yaml", one), ("b.yaml", one)]);
        let error = two.service().unwrap_err().to_string();
        assert!(error.contains("a.yaml, b.yaml"), "{error}");
    }
}
