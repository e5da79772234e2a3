//! The limits of a bootstrap file: its overload manager, and the runtime keys that say how many connections there may be.

use std::time::Duration;

use envoy_types::pb::envoy::config::bootstrap::v3 as pb;
use envoy_types::pb::envoy::config::overload::v3 as manager;
use envoy_types::pb::envoy::extensions::resource_monitors::downstream_connections::v3::DownstreamConnectionsConfig;
use envoy_types::pb::envoy::extensions::resource_monitors::fixed_heap::v3::FixedHeapConfig;
use envoy_types::pb::google::protobuf::Any;
use serde_json::Value as Json;

use crate::overload::{Action, Config, Resource, Trigger};
use crate::xds::decode::{Invalid, Under as _, duration, json, unpack};

const HEAP: &str = "envoy.resource_monitors.fixed_heap";
const CONNECTIONS: &str = "envoy.resource_monitors.global_downstream_max_connections";
/// Runtime key of the limit on all connections.
const ALL: &str = "overload.global_downstream_max_connections";
/// What is around a listener's name in the runtime key of its limit.
const OF_LISTENER: (&str, &str) = ("envoy.resource_limits.listener.", ".connection_limit");

/// What a bootstrap file says of limits.
pub(super) fn config(
    overload: Option<manager::OverloadManager>,
    runtime: Option<&pb::LayeredRuntime>,
) -> Result<Config, Invalid> {
    let mut config = Config::default();
    if let Some(runtime) = runtime {
        limits(runtime, &mut config).under("layered_runtime")?;
    }
    if let Some(overload) = overload {
        manager(overload, &mut config).under("overload_manager")?;
    }
    Ok(config)
}

/// Limits in the static layers of the runtime; of a key in several the last one counts.
fn limits(runtime: &pb::LayeredRuntime, config: &mut Config) -> Result<(), Invalid> {
    for (index, layer) in runtime.layers.iter().enumerate() {
        let Some(pb::runtime_layer::LayerSpecifier::StaticLayer(values)) = &layer.layer_specifier else {
            continue;
        };
        let mut found = Vec::new();
        flatten("", &Json::Object(json(values.clone())), &mut found);
        for (key, value) in found {
            let of_listener = key.strip_prefix(OF_LISTENER.0).and_then(|k| k.strip_suffix(OF_LISTENER.1));
            if key != ALL && of_listener.is_none() {
                continue;
            }
            let most = number(&value).ok_or_else(|| Invalid::new(&key, "must be a whole number"));
            let most = most.at("layers", index)?;
            match of_listener {
                Some(name) => drop(config.listeners.insert(name.into(), most)),
                None => config.connections = Some(most),
            }
        }
    }
    Ok(())
}

/// Runtime keys are written with dots, as maps in maps, or both.
fn flatten(prefix: &str, value: &Json, found: &mut Vec<(String, Json)>) {
    let Json::Object(fields) = value else { return found.push((prefix.to_owned(), value.clone())) };
    for (name, value) in fields {
        let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        flatten(&key, value, found);
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a whole number is looked for")]
fn number(value: &Json) -> Option<u64> {
    match value {
        Json::Number(n) => {
            n.as_u64().or_else(|| n.as_f64().filter(|n| *n >= 0.0 && n.fract() == 0.0).map(|n| n as u64))
        }
        Json::String(text) => text.parse().ok(),
        Json::Null | Json::Bool(_) | Json::Array(_) | Json::Object(_) => None,
    }
}

fn manager(overload: manager::OverloadManager, config: &mut Config) -> Result<(), Invalid> {
    if let Some(refresh) = overload.refresh_interval {
        config.refresh = duration(refresh).under("refresh_interval")?;
        if config.refresh < Duration::from_millis(1) {
            return Err(Invalid::new("refresh_interval", "must be at least 1ms"));
        }
    }
    if !overload.loadshed_points.is_empty() {
        return Err(Invalid::unsupported("loadshed_points"));
    }
    if overload.buffer_factory_config.is_some() {
        return Err(Invalid::unsupported("buffer_factory_config"));
    }
    let mut known = Vec::new();
    for (index, monitor) in overload.resource_monitors.into_iter().enumerate() {
        known.push(resource(monitor, config).at("resource_monitors", index)?);
    }
    for (index, of) in overload.actions.into_iter().enumerate() {
        let action = action(of, &known).at("actions", index)?;
        config.actions.push(action);
    }
    Ok(())
}

fn resource(monitor: manager::ResourceMonitor, config: &mut Config) -> Result<Resource, Invalid> {
    let Some(manager::resource_monitor::ConfigType::TypedConfig(any)) = monitor.config_type else {
        return Err(Invalid::missing("typed_config"));
    };
    let positive = |value: u64, field: &str| match value {
        0 => Err(Invalid::new(field, "must be more than 0")),
        value => Ok(value),
    };
    match monitor.name.as_str() {
        HEAP => {
            let heap: FixedHeapConfig = of_type(&any)?;
            if heap.max_heap_size_bytes_runtime.is_some() {
                return Err(Invalid::unsupported("typed_config.max_heap_size_bytes_runtime"));
            }
            config.heap = Some(positive(heap.max_heap_size_bytes, "typed_config.max_heap_size_bytes")?);
            Ok(Resource::Heap)
        }
        CONNECTIONS => {
            let connections: DownstreamConnectionsConfig = of_type(&any)?;
            let most = u64::try_from(connections.max_active_downstream_connections).unwrap_or_default();
            config.connections = Some(positive(most, "typed_config.max_active_downstream_connections")?);
            Ok(Resource::Connections)
        }
        name => Err(Invalid::new(
            "name",
            format!("`{name}` is not supported by this proxy; it has {HEAP}, {CONNECTIONS}"),
        )),
    }
}

fn of_type<M: prost::Message + prost::Name + Default>(any: &Any) -> Result<M, Invalid> {
    unpack(any).under("typed_config")
}

type Of = (Action, Vec<(Resource, Trigger)>);

fn action(of: manager::OverloadAction, known: &[Resource]) -> Result<Of, Invalid> {
    let name = of.name.strip_prefix("envoy.overload_actions.").unwrap_or_default();
    let known_action = Action::NAMES.into_iter().find(|(_, known)| *known == name);
    let (action, _) = known_action
        .ok_or_else(|| Invalid::new("name", format!("`{}` is not supported by this proxy", of.name)))?;
    if of.typed_config.is_some() {
        return Err(Invalid::unsupported("typed_config"));
    }
    if of.triggers.is_empty() {
        return Err(Invalid::missing("triggers"));
    }
    let triggers = of.triggers.into_iter().enumerate();
    let triggers = triggers.map(|(index, t)| trigger(t, known).at("triggers", index));
    Ok((action, triggers.collect::<Result<_, _>>()?))
}

fn trigger(trigger: manager::Trigger, known: &[Resource]) -> Result<(Resource, Trigger), Invalid> {
    use manager::trigger::TriggerOneof;
    let resource = match trigger.name.as_str() {
        HEAP => Some(Resource::Heap),
        CONNECTIONS => Some(Resource::Connections),
        _ => None,
    };
    let resource = resource.filter(|resource| known.contains(resource));
    let resource =
        resource.ok_or_else(|| Invalid::new("name", format!("no resource monitor `{}`", trigger.name)))?;
    let share = |value: f64, field: &str| {
        if (0.0..=1.0).contains(&value) { Ok(value) } else { Err(Invalid::new(field, "must be from 0 to 1")) }
    };
    let trigger = match trigger.trigger_oneof {
        Some(TriggerOneof::Threshold(threshold)) => {
            Trigger::Threshold(share(threshold.value, "threshold.value")?)
        }
        Some(TriggerOneof::Scaled(scaled)) => {
            let from = share(scaled.scaling_threshold, "scaled.scaling_threshold")?;
            let to = share(scaled.saturation_threshold, "scaled.saturation_threshold")?;
            if from >= to {
                return Err(Invalid::new(
                    "scaled",
                    "scaling_threshold must be less than saturation_threshold",
                ));
            }
            Trigger::Scaled(from, to)
        }
        None => return Err(Invalid::missing("threshold")),
    };
    Ok((resource, trigger))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANAGER: &str = r#"
overload_manager:
  refresh_interval: 0.25s
  resource_monitors:
  - name: envoy.resource_monitors.fixed_heap
    typed_config: {"@type": type.googleapis.com/envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig, max_heap_size_bytes: 1000000}
  - name: envoy.resource_monitors.global_downstream_max_connections
    typed_config: {"@type": type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig, max_active_downstream_connections: 50}
  actions:
  - name: envoy.overload_actions.stop_accepting_requests
    triggers: [{name: envoy.resource_monitors.fixed_heap, threshold: {value: 0.9}}]
  - name: envoy.overload_actions.disable_http_keepalive
    triggers: [{name: envoy.resource_monitors.fixed_heap, scaled: {scaling_threshold: 0.5, saturation_threshold: 0.8}}]
"#;

    #[test]
    fn limits_are_read_from_the_overload_manager_and_the_runtime() {
        let runtime = "layered_runtime: {layers: [{name: a, static_layer: {envoy.resource_limits.listener.in.connection_limit: 7, overload: {global_downstream_max_connections: 9}}}, {name: b, admin_layer: {}}]}\n";
        let config = crate::bootstrap::parse(&format!("{MANAGER}{runtime}"), jiff::Timestamp::UNIX_EPOCH)
            .unwrap()
            .overload;
        let heap = Resource::Heap;
        let expected = Config {
            refresh: Duration::from_millis(250),
            heap: Some(1_000_000),
            connections: Some(50),
            listeners: [("in".into(), 7)].into(),
            actions: vec![
                (Action::StopAcceptingRequests, vec![(heap, Trigger::Threshold(0.9))]),
                (Action::DisableHttpKeepalive, vec![(heap, Trigger::Scaled(0.5, 0.8))]),
            ],
        };
        assert_eq!(config, expected);
        let config = crate::bootstrap::parse(runtime, jiff::Timestamp::UNIX_EPOCH).unwrap().overload;
        assert_eq!(config.connections, Some(9));
    }

    #[test]
    fn limits_that_cannot_be_kept_are_refused_by_name() {
        for (what, with, reason) in [
            (
                "monitors.fixed_heap\n",
                "monitors.cpu_utilization\n",
                "overload_manager.resource_monitors[0].name: `envoy.resource_monitors.cpu_utilization` is not supported",
            ),
            (
                "1000000",
                "0",
                "overload_manager.resource_monitors[0].typed_config.max_heap_size_bytes: must be more than 0",
            ),
            (
                "stop_accepting_requests",
                "reduce_timeouts",
                "overload_manager.actions[0].name: `envoy.overload_actions.reduce_timeouts` is not supported",
            ),
            (
                "value: 0.9",
                "value: 9",
                "overload_manager.actions[0].triggers[0].threshold.value: must be from 0 to 1",
            ),
            (
                "saturation_threshold: 0.8",
                "saturation_threshold: 0.4",
                "overload_manager.actions[1].triggers[0].scaled: scaling_threshold must be less",
            ),
            (
                "fixed_heap, threshold",
                "nothing, threshold",
                "overload_manager.actions[0].triggers[0].name: no resource monitor `envoy.resource_monitors.nothing`",
            ),
            (
                "refresh_interval: 0.25s",
                "refresh_interval: 0s",
                "overload_manager.refresh_interval: must be at least 1ms",
            ),
            (
                "refresh_interval: 0.25s",
                "loadshed_points: [{name: a}]",
                "overload_manager.loadshed_points: not supported",
            ),
        ] {
            let text = MANAGER.replacen(what, with, 1);
            assert_ne!(text, MANAGER);
            let error = crate::bootstrap::parse(&text, jiff::Timestamp::UNIX_EPOCH).unwrap_err().to_string();
            assert!(error.starts_with(reason), "{error}");
        }
        let runtime = "layered_runtime: {layers: [{name: a, static_layer: {overload: {global_downstream_max_connections: many}}}]}";
        let error = crate::bootstrap::parse(runtime, jiff::Timestamp::UNIX_EPOCH).unwrap_err().to_string();
        assert_eq!(
            error,
            "layered_runtime.layers[0].overload.global_downstream_max_connections: must be a whole number"
        );
    }
}
