//! What agents are told about checking their application, and what they tell of it.

use registry::config::Kind;
use registry::model::workload::{HealthCheckMethod, ReadinessProbe, WorkloadGroup};
use registry::snapshot::Snapshot;
use registry::state::{ObjectKey, Registration};
use wire::mesh::probe::{Check, Exec, GrpcHealth, Header, HttpGet, TcpSocket};
use wire::mesh::{Probe, Readiness};

/// How much of a reason is kept, in bytes: it is in the log and in every list of workloads.
const REASON: usize = 256;

/// How a registered workload is checked: as its group says now.
pub(crate) fn of(snapshot: &Snapshot, registration: &Registration) -> Readiness {
    let key = ObjectKey {
        kind: Kind::WorkloadGroup,
        namespace: registration.namespace.clone(),
        name: registration.group.clone(),
    };
    let group = snapshot.object(&key).and_then(|object| object.get::<WorkloadGroup>());
    Readiness { probe: group.and_then(|group| group.probe.as_ref()).map(probe) }
}

/// What is kept of a reason: its beginning, in one line that is fit to be shown. Who is healthy needs none.
pub(crate) fn reason(healthy: bool, told: &str) -> String {
    if healthy {
        return String::new();
    }
    let line: String = told.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let line = line.trim();
    line.get(..line.floor_char_boundary(REASON)).unwrap_or(line).to_owned()
}

fn probe(probe: &ReadinessProbe) -> Probe {
    // What is negative was refused when it was written.
    let number = |number: i32| u32::try_from(number).unwrap_or(0);
    Probe {
        initial_delay_seconds: number(probe.initial_delay_seconds),
        timeout_seconds: number(probe.timeout_seconds),
        period_seconds: number(probe.period_seconds),
        success_threshold: number(probe.success_threshold),
        failure_threshold: number(probe.failure_threshold),
        check: probe.health_check_method.as_ref().map(check),
    }
}

fn check(method: &HealthCheckMethod) -> Check {
    match method {
        HealthCheckMethod::HttpGet(get) => {
            let header = |h: &registry::model::workload::HttpHeader| Header {
                name: h.name.clone(),
                value: h.value.clone(),
            };
            Check::HttpGet(HttpGet {
                host: get.host.clone(),
                port: get.port.into(),
                path: get.path.clone(),
                tls: get.scheme.eq_ignore_ascii_case("https"),
                headers: get.http_headers.iter().map(header).collect(),
            })
        }
        HealthCheckMethod::TcpSocket(socket) => {
            Check::TcpSocket(TcpSocket { host: socket.host.clone(), port: socket.port.into() })
        }
        HealthCheckMethod::Exec(exec) => Check::Exec(Exec { command: exec.command.clone() }),
        HealthCheckMethod::Grpc(grpc) => {
            Check::Grpc(GrpcHealth { port: grpc.port.into(), service: grpc.service.clone() })
        }
    }
}

#[cfg(test)]
mod tests {
    use registry::config::Object;
    use serde_json::{Value, json};

    use super::*;

    fn of_group(told: Value) -> Option<Probe> {
        let spec = json!({"template": {"serviceAccount": "a"}, "probe": told});
        let object = Object::new(Kind::WorkloadGroup, "shop", "vms", spec);
        object.get::<WorkloadGroup>().unwrap().probe.as_ref().map(probe)
    }

    #[test]
    fn every_kind_of_probe_reaches_the_agent_as_the_group_has_it() {
        assert_eq!(of_group(Value::Null), None);
        let numbers = json!({"initialDelaySeconds": 1, "timeoutSeconds": 2, "periodSeconds": 3,
            "successThreshold": 4, "failureThreshold": 5, "tcpSocket": {"host": "db", "port": 5432}});
        let expected = Probe {
            initial_delay_seconds: 1,
            timeout_seconds: 2,
            period_seconds: 3,
            success_threshold: 4,
            failure_threshold: 5,
            check: Some(Check::TcpSocket(TcpSocket { host: "db".into(), port: 5432 })),
        };
        assert_eq!(of_group(numbers), Some(expected));
        let http = json!({"httpGet": {"path": "/ready", "port": 80, "scheme": "HTTPS", "host": "h",
            "httpHeaders": [{"name": "x-a", "value": "b"}]}});
        let headers = vec![Header { name: "x-a".into(), value: "b".into() }];
        let http_get = HttpGet { host: "h".into(), port: 80, path: "/ready".into(), tls: true, headers };
        let grpc = GrpcHealth { port: 9000, service: "pay".into() };
        for (told, expected) in [
            (http, Check::HttpGet(http_get)),
            (
                json!({"exec": {"command": ["/bin/true", "-x"]}}),
                Check::Exec(Exec { command: vec!["/bin/true".into(), "-x".into()] }),
            ),
            (json!({"grpc": {"port": 9000, "service": "pay"}}), Check::Grpc(grpc)),
        ] {
            assert_eq!(of_group(told), Some(Probe { check: Some(expected), ..Probe::default() }));
        }
    }

    #[test]
    fn a_reason_is_one_short_line_and_only_of_who_is_not_healthy() {
        assert_eq!(reason(true, "x"), "");
        assert_eq!(reason(false, " a\nb\u{1b}[31m "), "a b [31m");
        let long = "ä".repeat(200);
        assert_eq!(reason(false, &long), "ä".repeat(128));
        assert_eq!(reason(false, &format!("x{long}")).len(), 255);
    }
}
