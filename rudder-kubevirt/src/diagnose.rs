//! What a cluster has, what it lacks, and what this user may do there.

use crate::{cluster::Cluster, errors::request_failed};
use futures::future::join_all;
use http::Request;
use k8s_openapi::api::{
    authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec},
    storage::v1::StorageClass,
};
use kube::{
    Api, ResourceExt as _,
    api::{ListParams, PostParams},
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{HostFinding, HostReport},
};
use serde_json::Value;
use std::collections::BTreeMap;

/// A right that the backend needs: API group, resource, verbs. The documentation of the backend has the same list as a Role.
pub(crate) const RIGHTS: &[(&str, &str, &[&str])] = &[
    ("coordination.k8s.io", "leases", &["create", "get", "list", "patch", "delete"]),
    ("kubevirt.io", "virtualmachines", &["create", "list", "watch", "patch", "delete", "deletecollection"]),
    ("kubevirt.io", "virtualmachineinstances", &["list", "watch"]),
    ("subresources.kubevirt.io", "virtualmachines/start", &["update"]),
    ("subresources.kubevirt.io", "virtualmachines/stop", &["update"]),
    ("subresources.kubevirt.io", "virtualmachineinstances/portforward", &["get"]),
    ("subresources.kubevirt.io", "virtualmachineinstances/console", &["get"]),
    ("subresources.kubevirt.io", "virtualmachineinstances/vnc", &["get"]),
    (
        "cdi.kubevirt.io",
        "datavolumes",
        &["create", "get", "list", "watch", "patch", "delete", "deletecollection"],
    ),
    ("", "persistentvolumeclaims", &["get"]),
    ("", "secrets", &["create", "get", "list", "watch", "patch", "delete", "deletecollection"]),
    ("", "configmaps", &["create", "get", "list", "patch", "delete"]),
    ("", "events", &["list"]),
];

/// The annotations that mark a default storage class: for virtual machines, and for everything.
const DEFAULTS: [&str; 2] =
    ["storageclass.kubevirt.io/is-default-virt-class", "storageclass.kubernetes.io/is-default-class"];

/// Reports what the cluster has.
pub(crate) async fn diagnose(cluster: Result<&Cluster>) -> HostReport {
    let mut report = HostReport::default();
    let cluster = match cluster {
        Ok(cluster) => cluster,
        Err(error) => {
            report.findings.push(missing("cluster", &error));
            return report;
        }
    };
    match cluster.client().apiserver_version().await {
        Ok(version) => {
            let detail = format!("Kubernetes {}, namespace {}", version.git_version, cluster.namespace());
            report.findings.push(HostFinding::present("cluster", detail));
        }
        Err(error) => {
            report.findings.push(missing("cluster", &request_failed(error, "reach the cluster")));
            return report;
        }
    }
    report.findings.push(kubevirt(cluster).await);
    report.findings.push(cdi(cluster).await);
    report.findings.extend(rights(cluster).await);
    report.findings.push(storage(cluster).await);
    report
}

/// Returns the versions to record in the provenance.
pub(crate) async fn versions(cluster: &Cluster) -> Result<BTreeMap<String, String>> {
    let version = cluster
        .client()
        .apiserver_version()
        .await
        .map_err(|error| request_failed(error, "reach the cluster"))?;
    let mut versions = BTreeMap::from([("kubernetes".to_owned(), version.git_version)]);
    let kubevirt = kubevirt_version(cluster).await?;
    versions.insert("kubevirt".to_owned(), kubevirt);
    Ok(versions)
}

/// Asks KubeVirt's own API for its version.
async fn kubevirt_version(cluster: &Cluster) -> Result<String> {
    let request = Request::get("/apis/subresources.kubevirt.io/v1/version").body(Vec::new());
    let request = request
        .map_err(|error| Error::new(ErrorKind::Internal, "cannot form a request").with_source(error))?;
    match cluster.client().request::<Value>(request).await {
        Ok(answer) => Ok(answer["gitVersion"].as_str().unwrap_or("unknown").to_owned()),
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 503) => {
            Err(Error::new(ErrorKind::HostMissing, "the cluster has no KubeVirt that answers").with_help(
                "install KubeVirt (https://kubevirt.io/user-guide/cluster_admin/installation/), or wait until it is ready: \
                 kubectl get kubevirt -A",
            ))
        }
        Err(error) => Err(request_failed(error, "ask KubeVirt for its version")),
    }
}

async fn kubevirt(cluster: &Cluster) -> HostFinding {
    match kubevirt_version(cluster).await {
        Ok(version) => HostFinding::present("kubevirt", version),
        Err(error) => missing("kubevirt", &error),
    }
}

async fn cdi(cluster: &Cluster) -> HostFinding {
    match cluster.client().list_api_group_resources("cdi.kubevirt.io/v1beta1").await {
        Ok(_) => HostFinding::present("cdi", "cdi.kubevirt.io/v1beta1"),
        Err(kube::Error::Api(status)) if status.code == 404 => HostFinding::missing("cdi", "the cluster does not have it")
            .help("install CDI, the Containerized Data Importer: https://kubevirt.io/user-guide/storage/containerized_data_importer/".to_owned()),
        Err(error) => missing("cdi", &request_failed(error, "look for CDI")),
    }
}

/// Asks for every right that the backend needs; those that are missing are one finding each.
async fn rights(cluster: &Cluster) -> Vec<HostFinding> {
    let reviews: Api<SelfSubjectAccessReview> = Api::all(cluster.client().clone());
    let mut wanted = Vec::new();
    for (group, resource, verbs) in RIGHTS {
        wanted.extend(verbs.iter().map(|verb| (*group, *resource, *verb)));
    }
    let asked = wanted.iter().map(|&(group, resource, verb)| {
        let reviews = reviews.clone();
        async move {
            let (resource, subresource) = match resource.split_once('/') {
                Some((resource, subresource)) => (resource, Some(subresource.to_owned())),
                None => (resource, None),
            };
            let attributes = ResourceAttributes {
                group: Some(group.to_owned()),
                resource: Some(resource.to_owned()),
                subresource,
                verb: Some(verb.to_owned()),
                namespace: Some(cluster.namespace().to_owned()),
                ..ResourceAttributes::default()
            };
            let spec =
                SelfSubjectAccessReviewSpec { resource_attributes: Some(attributes), ..Default::default() };
            let review = SelfSubjectAccessReview { spec, ..Default::default() };
            reviews.create(&PostParams::default(), &review).await
        }
    });
    let answers = join_all(asked.collect::<Vec<_>>()).await;
    let mut findings = Vec::new();
    for ((group, resource, verb), answer) in wanted.into_iter().zip(answers) {
        match answer {
            Ok(review) if review.status.as_ref().is_some_and(|status| status.allowed) => {}
            Ok(_) => {
                let rule =
                    format!("{{apiGroups: [{group:?}], resources: [{resource:?}], verbs: [{verb:?}]}}");
                findings.push(
                    HostFinding::missing(
                        "rights",
                        format!("may not {verb} {resource} in namespace {}", cluster.namespace()),
                    )
                    .help(format!("add this rule to a Role of the user: {rule}")),
                );
            }
            Err(error) => {
                findings.push(missing("rights", &request_failed(error, "ask what this user may do")));
                break;
            }
        }
    }
    if findings.is_empty() {
        findings.push(HostFinding::present(
            "rights",
            format!("all that a build needs in namespace {}", cluster.namespace()),
        ));
    }
    findings
}

async fn storage(cluster: &Cluster) -> HostFinding {
    let classes: Api<StorageClass> = Api::all(cluster.client().clone());
    let help = "set a default storage class, or that of the backend: kubectl get storageclass".to_owned();
    match classes.list(&ListParams::default()).await {
        Ok(list) => {
            let marked = |class: &StorageClass, key: &str| {
                class.annotations().get(key).is_some_and(|value| value == "true")
            };
            let default = DEFAULTS.iter().find_map(|key| list.items.iter().find(|class| marked(class, key)));
            match default {
                Some(class) => HostFinding::present("storage class", class.name_any()).optional(),
                None => HostFinding::missing("storage class", "the cluster has no default one")
                    .optional()
                    .help(help),
            }
        }
        // Storage classes belong to no namespace, and many users may not list them.
        Err(kube::Error::Api(status)) if status.code == 403 => {
            HostFinding::present("storage class", "unknown: this user may not list them").optional()
        }
        Err(error) => missing("storage class", &request_failed(error, "list storage classes")).optional(),
    }
}

fn missing(what: &str, error: &Error) -> HostFinding {
    let finding = HostFinding::missing(what, error.to_string());
    match error.help() {
        Some(help) => finding.help(help.to_owned()),
        None => finding,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde::Deserialize as _;

    #[test]
    fn the_documented_role_has_exactly_the_rights_that_are_checked() {
        let text =
            std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/kubevirt-role.yaml"))
                .unwrap();
        let documents =
            serde_yaml::Deserializer::from_str(&text).map(|document| Value::deserialize(document).unwrap());
        let role = documents.into_iter().find(|document| document["kind"] == "Role").unwrap();
        let texts = |value: &Value| -> Vec<String> {
            value.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
        };
        let documented: Vec<_> = role["rules"]
            .as_array()
            .unwrap()
            .iter()
            .map(|rule| {
                (
                    texts(&rule["apiGroups"]).concat(),
                    texts(&rule["resources"]).concat(),
                    texts(&rule["verbs"]),
                )
            })
            .collect();
        let checked: Vec<_> = RIGHTS
            .iter()
            .map(|(group, resource, verbs)| {
                let verbs = verbs.iter().map(|&verb| verb.to_owned()).collect::<Vec<_>>();
                ((*group).to_owned(), (*resource).to_owned(), verbs)
            })
            .collect();
        assert_eq!(documented, checked);
    }
}
